"""The suite's tests that cannot apply to any broker but the one they were written for, each with the reason."""

from __future__ import annotations

_STUB = "looks into StubBroker's queues, which are lists in memory"
_PIKA = "is about connections, channels and queues of RabbitMQ"
_REDIS = "looks into Redis's keys"

INAPPLICABLE = {
    "test_actors.py::test_actors_can_be_sent_messages": _STUB,
    "test_actors.py::test_messages_belonging_to_missing_actors_are_rejected": "compares StubBroker's dead_letters, a list in memory",
    "test_actors.py::test_worker_handles_non_numeric_eta_and_logs_warning": _STUB,
    "test_actors.py::test_worker_handles_none_eta": _STUB,
    "test_stub_broker.py::test_stub_broker_can_be_flushed": _STUB,
    "test_stub_broker.py::test_stub_broker_respects_prefetch": _STUB,
    "test_rabbitmq.py::test_rabbitmq_broker_raises_an_error_if_given_invalid_parameter_combinations": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_broker_stops_retrying_declaring_queues_when_max_attempts_reached": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_broker_reconnects_after_enqueue_failure": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_workers_handle_rabbit_failures_gracefully": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_connections_can_be_deleted_multiple_times": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_channels_can_be_deleted_multiple_times": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_consumers_ignore_unknown_messages_in_ack_and_nack": "acks a mock with RabbitMQ's delivery tag",
    "test_rabbitmq.py::test_ignore_scary_logs_filter_ignores_logs": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_close_only_registers_ignore_filter_once": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_broker_can_enqueue_messages_with_priority": "has RabbitMQ's priorities, where the higher comes first",
    "test_rabbitmq.py::test_rabbitmq_broker_retries_declaring_queues_when_connection_related_errors_occur": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_broker_consuming_messages_re_declares_queues_when_declared_queue_disappears": _PIKA,
    "test_rabbitmq.py::test_rabbitmq_broker_enqueueing_message_re_declares_queues_when_declared_queue_disappears": _PIKA,
    "test_redis.py::test_redis_unacked_messages_can_be_requeued": _REDIS,
    "test_redis.py::test_redis_messages_can_be_dead_lettered": _REDIS,
    "test_redis.py::test_redis_dead_lettered_messages_are_cleaned_up": _REDIS,
    "test_redis.py::test_redis_messages_belonging_to_missing_actors_are_rejected": _REDIS,
    "test_redis.py::test_redis_requeues_unhandled_messages_on_shutdown": _REDIS,
    "test_redis.py::test_redis_requeues_unhandled_delay_messages_on_shutdown": _REDIS,
    "test_redis.py::test_redis_broker_can_connect_via_url": "makes a connection to Redis",
    "test_redis.py::test_redis_broker_can_connect_via_client": "makes a connection to Redis",
    "test_redis.py::test_redis_consumer_ack_can_retry_on_connection_error": "patches RedisBroker's do_ack",
    "test_redis.py::test_redis_consumer_nack_can_retry_on_connection_error": "patches RedisBroker's do_nack",
    "test_redis.py::test_redis_consumer_nack_does_not_raise_on_missing_id": "nacks a message that was never delivered",
    "test_redis.py::test_redis_join_race_condition": "calls RedisBroker's do_qsize",
}

"""The suite's tests that cannot apply to any broker but the one they were written for, each with the reason."""

from __future__ import annotations

#: (module, reason, tests)
_GROUPS = [
    (
        "test_actors.py",
        "looks into StubBroker's queues, which are lists in memory",
        [
            "test_actors_can_be_sent_messages",
            "test_worker_handles_non_numeric_eta_and_logs_warning",
            "test_worker_handles_none_eta",
        ],
    ),
    (
        "test_actors.py",
        "compares StubBroker's dead_letters, a list in memory",
        [
            "test_messages_belonging_to_missing_actors_are_rejected",
        ],
    ),
    (
        "test_stub_broker.py",
        "looks into StubBroker's queues, which are lists in memory",
        [
            "test_stub_broker_can_be_flushed",
            "test_stub_broker_respects_prefetch",
        ],
    ),
    (
        "test_rabbitmq.py",
        "is about connections, channels and queues of RabbitMQ",
        [
            "test_rabbitmq_broker_raises_an_error_if_given_invalid_parameter_combinations",
            "test_rabbitmq_broker_stops_retrying_declaring_queues_when_max_attempts_reached",
            "test_rabbitmq_broker_reconnects_after_enqueue_failure",
            "test_rabbitmq_workers_handle_rabbit_failures_gracefully",
            "test_rabbitmq_connections_can_be_deleted_multiple_times",
            "test_rabbitmq_channels_can_be_deleted_multiple_times",
            "test_ignore_scary_logs_filter_ignores_logs",
            "test_rabbitmq_close_only_registers_ignore_filter_once",
            "test_rabbitmq_broker_retries_declaring_queues_when_connection_related_errors_occur",
            "test_rabbitmq_broker_consuming_messages_re_declares_queues_when_declared_queue_disappears",
            "test_rabbitmq_broker_enqueueing_message_re_declares_queues_when_declared_queue_disappears",
        ],
    ),
    (
        "test_rabbitmq.py",
        "consumes a queue that was never declared",
        [
            "test_rabbitmq_consumers_ignore_unknown_messages_in_ack_and_nack",
        ],
    ),
    (
        "test_redis.py",
        "looks into Redis's keys",
        [
            "test_redis_unacked_messages_can_be_requeued",
            "test_redis_messages_can_be_dead_lettered",
            "test_redis_dead_lettered_messages_are_cleaned_up",
            "test_redis_messages_belonging_to_missing_actors_are_rejected",
            "test_redis_requeues_unhandled_messages_on_shutdown",
            "test_redis_requeues_unhandled_delay_messages_on_shutdown",
        ],
    ),
    (
        "test_redis.py",
        "makes a connection to Redis",
        [
            "test_redis_broker_can_connect_via_url",
            "test_redis_broker_can_connect_via_client",
        ],
    ),
    (
        "test_redis.py",
        "patches RedisBroker's do_ack",
        [
            "test_redis_consumer_ack_can_retry_on_connection_error",
        ],
    ),
    (
        "test_redis.py",
        "patches RedisBroker's do_nack",
        [
            "test_redis_consumer_nack_can_retry_on_connection_error",
        ],
    ),
    (
        "test_redis.py",
        "calls RedisBroker's do_qsize",
        [
            "test_redis_join_race_condition",
        ],
    ),
]

INAPPLICABLE = {f"{module}::{test}": reason for module, reason, tests in _GROUPS for test in tests}

import time

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker()  # DRAMATIQ_DURABLE_URL, or else a Postgres of its own
dramatiq.set_broker(broker)


class Declined(Exception):
    pass


@durable.activity(queue_name="shop", heartbeat="5s", retry=durable.RetryPolicy(initial_interval=0.1))
def copy_lines(lines: int) -> int:
    info = durable.activity_info()
    done = info.heartbeat_details or 0  # where the attempt before this one was
    for line in range(done, lines):
        durable.heartbeat(line + 1)
        if line == 7 and info.attempt == 1:
            raise ConnectionError("the other side hung up")
        time.sleep(0.01)
    return lines - done


@durable.activity(queue_name="shop", retry=durable.RetryPolicy(maximum_attempts=3, non_retryable=(Declined,)))
def charge(order_id: str) -> str:
    raise Declined("insufficient funds")


@durable.activity(queue_name="shop", schedule_to_close="3 days")
def ask_the_bank(order_id: str) -> None:
    print("callback with", durable.complete_later())  # what the actor returns is ignored from here on


@durable.workflow(queue_name="orders")
async def order(order_id: str) -> str:
    copied = await copy_lines.execute(20)
    try:
        await charge.options(start_to_close="30s").execute(order_id)
    except durable.ActivityFailed as e:
        reason = f"{e.type} at attempt {e.attempt}"
    answer = await ask_the_bank.execute(order_id)
    return f"{copied} lines in the second attempt; {reason}; the bank says {answer}"


if __name__ == "__main__":
    run = order.start("o-1")
    token = input("token: ")
    durable.complete_activity(token, "yes")
    print(run.result(timeout=60))

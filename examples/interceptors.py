"""Interceptors: every run knows its tenant, every activity is told, and what moves money is written down first.

In one terminal the worker, ``dramatiq examples.interceptors``; in another ``python -m examples.interceptors``.
"""

from contextvars import ContextVar
from typing import Any

import dramatiq

import dramatiq_durable as durable

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Tenants(durable.WorkflowInterceptor):
    """Refuses runs that belong to nobody, and gives each activity a number, for the logs of both sides."""

    async def execute_workflow(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        if "tenant" not in ctx.headers:
            raise PermissionError(f"start {ctx.name} with options(headers={{'tenant': ...}})")
        return await call_next(ctx)

    async def execute_activity(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        ctx.headers["trace"] = str(durable.uuid4())
        durable.logger.info("%s is %s", ctx.headers["trace"], ctx.name)
        return await call_next(ctx)


class Audit(durable.WorkflowInterceptor):
    """Has payments written down before and after, by an activity of its own."""

    async def execute_activity(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        if ctx.name != "charge":
            return await call_next(ctx)
        await write_down.execute(f"to charge {ctx.args}")
        receipt = await call_next(ctx)
        await write_down.execute(f"charged: {receipt}")
        return receipt


class TenantOfActivity(dramatiq.Middleware):
    """Around the actor, on the worker that runs it, there is Dramatiq's middleware."""

    def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        tenant.set((message.options.get("headers") or {}).get("tenant", "nobody"))


broker = durable.DurableBroker(interceptors=[Tenants(), Audit()])
broker.add_middleware(TenantOfActivity())
dramatiq.set_broker(broker)


@durable.activity(queue_name="audit")
def write_down(what: str) -> None:
    print(f"[{tenant.get()}] {what}")


@durable.activity(queue_name="payments")
def charge(cents: int) -> str:
    return f"receipt of {tenant.get()} over {cents}"


@durable.workflow(queue_name="orders")
async def order(cents: int) -> str:
    return await charge.execute(cents)


if __name__ == "__main__":
    print(order.options(headers={"tenant": "acme"}).start(500).result(timeout=30))
    try:
        order.start(500).result(timeout=30)
    except durable.WorkflowFailed as failure:
        print(failure)

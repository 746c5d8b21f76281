from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

import dramatiq_durable as durable

from .models import Base, Line, Order, engine, new_session
from .work import broker, fulfil, greet


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    broker.close()
    await engine.dispose()


async def open_session() -> AsyncIterator[AsyncSession]:
    async with new_session() as session:
        yield session


app = FastAPI(lifespan=lifespan)
Session = Annotated[AsyncSession, Depends(open_session)]


class NewLine(BaseModel):
    product: str
    quantity: int


class NewOrder(BaseModel):
    email: str
    lines: list[NewLine]


class Shown(BaseModel):
    id: int
    status: str


@app.post("/orders", status_code=201)
async def place_order(new: NewOrder, session: Session) -> Shown:
    try:
        async with session.begin(), durable.using(session):
            order = Order(email=new.email)
            session.add(order)
            await session.flush()  # now it has an id
            await fulfil.options(workflow_id=f"order-{order.id}").astart(order.id)
            greet.send(order.email)
            # Where this fails, the order was never placed, its workflow never started and nobody greeted.
            session.add_all(Line(order_id=order.id, **line.model_dump()) for line in new.lines)
    except IntegrityError:
        raise HTTPException(400, "a quantity is a number from 1 on") from None
    return Shown(id=order.id, status=order.status)


@app.get("/orders/{order_id}")
async def show_order(order_id: int, session: Session) -> Shown:
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404)
    return Shown(id=order.id, status=order.status)


@app.post("/orders/{order_id}/approval")
async def approve(order_id: int, session: Session) -> Shown:
    try:
        async with session.begin(), durable.using(session):
            order = await session.get(Order, order_id)
            if order is None:
                raise HTTPException(404)
            order.status = "approved"
            await durable.get_handle(f"order-{order_id}").asignal("approval")
    except durable.WorkflowClosed:
        raise HTTPException(409, "this order has been dealt with already") from None
    return Shown(id=order.id, status=order.status)

import os

from sqlalchemy import CheckConstraint, ForeignKey, make_url
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# The shop's tables and its messages are in one database: only so can they share a transaction.
URL = os.environ["DRAMATIQ_DURABLE_URL"]

engine = create_async_engine(make_url(URL).set(drivername="postgresql+psycopg"))
new_session = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    status: Mapped[str] = mapped_column(default="placed")


class Line(Base):
    __tablename__ = "lines"
    __table_args__ = (CheckConstraint("quantity > 0", name="quantity_is_positive"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    product: Mapped[str]
    quantity: Mapped[int]

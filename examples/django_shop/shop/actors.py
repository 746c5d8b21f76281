import dramatiq

from .models import Order


@dramatiq.actor(queue_name="shop")
def confirm(order_id):
    # It may run twice, should a worker die; the second time there is nothing left to do.
    Order.objects.filter(id=order_id, status="placed").update(status="confirmed")

import json

from django.db import IntegrityError, connection, transaction
from django.http import JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST

import dramatiq_durable as durable

from .actors import confirm
from .models import Line, Order


@csrf_exempt
@require_POST
def place_order(request):
    new = json.loads(request.body)
    try:
        with transaction.atomic(), durable.using(connection):
            order = Order.objects.create(email=new["email"])
            confirm.send(order.id)
            # Where this fails, the order was never placed and the message never sent.
            Line.objects.bulk_create(Line(order=order, **line) for line in new["lines"])
    except IntegrityError:
        return JsonResponse({"error": "a quantity is a number from 0 on"}, status=400)
    return JsonResponse({"id": order.id, "status": order.status}, status=201)


@require_GET
def show_order(request, order_id):
    order = get_object_or_404(Order, id=order_id)
    return JsonResponse({"id": order.id, "status": order.status})

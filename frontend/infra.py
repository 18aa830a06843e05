"""The endpoints that serve no model: /v1/models, /health, /live, /metrics."""

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from frontend.service import SERVICE, Service
from router.replica import ReplicaPhase
from workers.card import Instance


def json_response(content: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, content_type="application/json"
    )


async def list_models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    return json_response(
        {
            "object": "list",
            "data": [
                {
                    "id": model.card.name,
                    "object": "model",
                    "created": model.created_s,
                    "owned_by": "reckon",
                    "context_window": model.card.context_length,
                }
                for model in service.models.models()
            ],
        }
    )


async def live(request: web.Request) -> web.Response:
    if request.app[SERVICE].draining.is_set():
        return json_response(
            {"status": "shutting_down", "message": "Service is shutting down"}, 503
        )
    return json_response({"status": "live", "message": "Service is live"})


async def health(request: web.Request) -> web.Response:
    """200 while requests are taken, also with no model yet (`models` tells), 503 else."""
    service = request.app[SERVICE]
    status, http_status = _health_status(service)
    replica = service.replica.status()
    instances = service.models.instances()
    return json_response(
        {
            "status": status,
            "why": replica.why,
            "models": [model.card.name for model in service.models.models()],
            "endpoints": sorted({_endpoint(instance) for instance in instances}),
            "instances": [_instance(instance) for instance in instances],
            "refused": [
                {"instance_id": worker_id, "why": why}
                for worker_id, why in sorted(service.models.refused().items())
            ],
            "replica": replica,
            "snapshot_trouble": None if service.snapshots is None else service.snapshots.trouble,
            "anomalies": service.replica.state.anomalies,
            "log": {
                "cursor": replica.cursor,
                "head": replica.head,
                "lag": replica.lag_records,
                "buffered_events": service.router.buffered_events,
            },
        },
        http_status,
    )


def _health_status(service: Service) -> tuple[str, int]:
    if service.draining.is_set():
        return "shutting_down", 503
    match service.replica.status().phase:
        case ReplicaPhase.STARTING:
            return "starting", 503
        case ReplicaPhase.CATCHING_UP:
            return "catching_up", 503
        case ReplicaPhase.DEGRADED:
            return "degraded", 200
        case ReplicaPhase.READY:
            return "healthy", 200


def _endpoint(instance: Instance) -> str:
    return f"dyn://{instance.namespace}.{instance.component}.{instance.endpoint}"


def _instance(instance: Instance) -> dict[str, object]:
    return {
        "namespace": instance.namespace,
        "component": instance.component,
        "endpoint": instance.endpoint,
        "instance_id": instance.worker_id,
        "transport": {"tcp": instance.address},
    }


async def metrics(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.router_metrics.collect()
    service.metrics.collect(service.replica)
    body = generate_latest(service.registry)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

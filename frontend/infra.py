"""The endpoints that serve no model: the models there are, health, liveness, metrics."""

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from frontend.errors import ModelNotFound
from frontend.exposition import exposition
from frontend.legs import missing_roles
from frontend.served import ServedModel
from frontend.service import FRONTEND, Frontend, Service
from router.replica import ReplicaPhase
from workers.card import Instance


def json_response(content: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, content_type="application/json"
    )


def constant_json(body: bytes) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that always answers so."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    return answer


async def list_models(request: web.Request) -> web.Response:
    """A model that several namespaces have stands here once, as the first of them serves it."""
    models = _models(request.app[FRONTEND])
    listed = [_listed(name, model) for name, model in models.items()]
    return json_response({"object": "list", "data": listed})


async def one_model(request: web.Request) -> web.Response:
    """An entry of the list by its id, which may have slashes. Raises ModelNotFound."""
    models, name = _models(request.app[FRONTEND]), request.match_info["model"]
    if name not in models:
        raise ModelNotFound(name, list(models))
    return json_response(_listed(name, models[name]))


def _listed(name: str, model: ServedModel) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "reckon",
        "context_window": model.card.context_length,
    }


async def live(request: web.Request) -> web.Response:
    if request.app[FRONTEND].draining.is_set():
        return json_response(
            {"status": "shutting_down", "message": "Service is shutting down"}, 503
        )
    return json_response({"status": "live", "message": "Service is live"})


async def health(request: web.Request) -> web.Response:
    """200 while requests are taken, also with no model yet (`models` tells), 503 else.

    A frontend of one namespace tells of its log and its replica at the top, one with a prefix of
    each below `namespaces`.
    """
    frontend = request.app[FRONTEND]
    services = list(frontend.services.values())
    status, http_status, why = _status(frontend)
    instances = [instance for service in services for instance in service.models.instances()]
    content: dict[str, object] = {
        "status": status,
        "why": why,
        "models": list(_models(frontend)),
        "not_ready": [
            {"model": model.card.name, "missing_roles": missing}
            for service in services
            for model in service.models.models()
            if (missing := missing_roles(service, model.card.name))
        ],
        "endpoints": sorted({_endpoint(instance) for instance in instances}),
        "instances": [_instance(instance) for instance in instances],
        "refused": [
            {"instance_id": worker_id, "why": why}
            for service in services
            for worker_id, why in sorted(service.models.refused().items())
        ],
        "set_aside": [
            {"instance_id": each.worker_id, "failures": each.failures, "for_s": each.for_s}
            for service in services
            for each in service.router.workers_set_aside()
        ],
    }
    if frontend.prefix is not None:
        content["namespaces"] = _namespaces(frontend)
    for service in services if frontend.prefix is None else []:
        content |= _log_of(service)
    return json_response(content, http_status)


def _models(frontend: Frontend) -> dict[str, ServedModel]:
    """By name, in order."""
    found: dict[str, ServedModel] = {}
    for service in frontend.services.values():
        for model in service.models.models():
            found.setdefault(model.card.name, model)
    return dict(sorted(found.items()))


def _status(frontend: Frontend) -> tuple[str, int, str | None]:
    """(status, HTTP status, why): the worst of the namespaces'.

    A namespace that was found when others were served already, or that can't be served, does not
    take the frontend out of a load balancer: it would take all frontends out at once.
    """
    if frontend.draining.is_set():
        return "shutting_down", 503, None
    if not frontend.has_looked:
        return "starting", 503, "looking for namespaces"
    phases: dict[ReplicaPhase, str | None] = {}
    for service in frontend.services.values():
        replica = service.replica.status()
        phase, why = replica.phase, replica.why
        if frontend.prefix is not None:
            why = f"{service.namespace}: {why or phase}"
        if service.is_late and phase is not ReplicaPhase.READY:
            phase = ReplicaPhase.DEGRADED
        phases.setdefault(phase, why)
    for namespace, why in frontend.unusable.items():
        phases.setdefault(ReplicaPhase.DEGRADED, f"{namespace}: {why}")
    for phase in (ReplicaPhase.STARTING, ReplicaPhase.CATCHING_UP):
        if phase in phases:
            return phase.value, 503, phases[phase]
    if ReplicaPhase.DEGRADED in phases:
        return "degraded", 200, phases[ReplicaPhase.DEGRADED]
    return "healthy", 200, None


def _namespaces(frontend: Frontend) -> dict[str, object]:
    found: dict[str, object] = {}
    for namespace, service in frontend.services.items():
        models = [model.card.name for model in service.models.models()]
        found[namespace] = {"models": models, **_log_of(service)}
    unusable = {
        namespace: {"replica": {"phase": "unusable", "why": why}}
        for namespace, why in frontend.unusable.items()
    }
    return dict(sorted((unusable | found).items()))


def _log_of(service: Service) -> dict[str, object]:
    replica = service.replica.status()
    return {
        "replica": replica,
        "snapshot_trouble": None if service.snapshots is None else service.snapshots.trouble,
        "anomalies": service.replica.state.anomalies,
        "log": {
            "cursor": replica.cursor,
            "head": replica.head,
            "lag": replica.lag_records,
            "buffered_events": service.router.buffered_events,
        },
    }


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
    body = exposition(request.app[FRONTEND])
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

"""/metrics: the registries of a frontend and of its namespaces as one text."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from frontend.service import Frontend

NAMESPACE = "dynamo_namespace"
"""The peer's label. `namespace` is what scrapers on Kubernetes add on their own."""


class Merged(Collector):
    """Families of the same name from several registries, each sample labelled with its registry's
    key; those of `plain` are not."""

    def __init__(self, plain: CollectorRegistry, labelled: Mapping[str, CollectorRegistry]) -> None:
        self._plain = plain
        self._labelled = labelled

    def collect(self) -> Iterator[Family]:
        families: dict[str, Family] = {}
        for namespace, registry in (("", self._plain), *self._labelled.items()):
            labels = {NAMESPACE: namespace} if namespace else {}
            for family in registry.collect():
                merged = families.setdefault(
                    family.name,
                    Family(family.name, family.documentation, family.type, family.unit),
                )
                merged.samples += [
                    sample._replace(labels=labels | sample.labels) for sample in family.samples
                ]
        yield from families.values()


def exposition(frontend: Frontend) -> bytes:
    """All metrics as they are now, in Prometheus's text form."""
    services = frontend.services
    for service in services.values():
        service.router_metrics.collect()
        service.metrics.collect(service.replica, service.router.parking)
    if frontend.prefix is None:
        return generate_latest(frontend.registry)
    together = CollectorRegistry()
    registries = {namespace: each.registry for namespace, each in services.items()}
    together.register(Merged(frontend.registry, registries))
    return generate_latest(together)

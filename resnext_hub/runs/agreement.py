"""Facts that all processes of a run must agree on before it starts."""

import hashlib
import json

from resnext_hub.errors import setting
from resnext_hub.machine import device_type, source_digest, versions
from resnext_hub.text import listing
from resnext_hub.training.config import process_fields
from resnext_hub.training.plan import Plan


def shared_facts(plan: Plan) -> dict[str, object]:
    """Return the facts that must be equal in every process of a run, by the name that messages use.

    A local dataset or model may have another path on another host: the dataset is compared by its content, and all
    processes start from the weights of the main process.
    """
    config, splits = plan.config, plan.splits
    excluded = set(process_fields())
    if config.elastic is not None:
        excluded.discard("threads")
    excluded.add("class_weights")  # a file may have another path on another host; the weights are compared below
    if splits.hub_id is None:
        excluded.add("dataset")
    if config.model.startswith("local-dir:"):
        excluded.add("model")
    settings = {setting(name): value for name, value in config.to_flat().items() if name not in excluded}
    names = hashlib.sha256(json.dumps(splits.label_names).encode()).hexdigest()[:8]
    installed = versions()
    return settings | {
        "architecture": f"{plan.source.architecture} {plan.source.model_args or ''}".rstrip(),
        "class names": f"{listing(splits.label_names, 6)} ({len(splits.label_names)} in total, digest {names})",
        "training images": splits.train.count,
        **{f"{part} images": images.count for part, images in splits.evaluated.items()},
        "class weights": plan.balance.digest,
        "dataset fingerprint": splits.fingerprint[:16],
        "device": device_type(),
        "precision": plan.precision,
        "input": str(plan.input.to_timm()),
        "resnext-hub": f"{installed['resnext-hub']} (source {source_digest()[:8]})",
        **{name: installed.get(name) for name in ("torch", "timm", "numpy", "pillow", "simplejpeg")},
    }

"""What the processes of a run have to agree on before it starts."""

import hashlib
import json

from resnext_hub.machine import device_type, source_digest, versions
from resnext_hub.settings import flag_of
from resnext_hub.text import listing
from resnext_hub.training.config import process_fields
from resnext_hub.training.plan import Plan


def shared_facts(plan: Plan) -> dict[str, object]:
    """Return what has to be equal in every process of a run, by the name used in messages.

    A local dataset or model may lie elsewhere on another host: the dataset is compared by its content, and the main
    process's weights are sent to all.
    """
    config, splits = plan.config, plan.splits
    own = set(process_fields())
    if splits.hub_id is None:
        own.add("dataset")
    if config.model.startswith("local-dir:"):
        own.add("model")
    settings = {flag_of(name): value for name, value in config.to_flat().items() if name not in own}
    names = hashlib.sha256(json.dumps(splits.label_names).encode()).hexdigest()[:8]
    computing = versions()
    return settings | {
        "architecture": f"{plan.source.architecture} {plan.source.model_args or ''}".rstrip(),
        "class names": f"{listing(splits.label_names, 6)} ({len(splits.label_names)} in all, digest {names})",
        "training images": splits.train.count,
        "evaluation images": splits.eval.count,
        "dataset fingerprint": splits.fingerprint[:16],
        "device": device_type(),
        "precision": plan.precision,
        "input": str(plan.input.to_timm()),
        "resnext-hub": f"{computing['resnext-hub']} (source {source_digest()[:8]})",
        **{name: computing.get(name) for name in ("torch", "timm", "numpy", "pillow", "simplejpeg")},
    }

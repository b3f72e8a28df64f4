"""The files of `.eval_results`, the Hub's successor to `model-index` (https://huggingface.co/docs/hub/eval-results)."""

from resnext_hub.record import RunRecord
from resnext_hub.text import printable, slug

EVAL_RESULTS = ".eval_results"
"""The folder of a repository that the Hub reads them from."""


def eval_results(record: RunRecord) -> dict[str, str]:
    """Return the files of a repository that state the result of a run to the Hub, by name.

    The Hub shows such a result on the leaderboard of the dataset. So there is none unless the images are a split of a
    dataset on the Hub, complete and not used for training: images that a run held out for itself, or a fold, are no
    benchmark.
    """
    import yaml

    dataset, facts = record.dataset, record.reported
    part = "evaluation" if record.test is None else "test"
    split = dataset.eval_split if record.test is None else dataset.test_split
    whole = split not in (None, dataset.train_split) and record.config.get("exclude") is None
    unread = any(entry.split == part for entry in record.unreadable_images)
    if dataset.hub_id is None or not whole or unread:
        return {}
    value = facts.mean_average_precision if facts.is_multi_label else facts.top1
    metric = "mean average precision" if facts.is_multi_label else f"top-1 accuracy, {facts.correct}/{facts.count}"
    augmented = "" if facts.without_tta is None else ", with test-time augmentation"
    entry = {
        "dataset": {
            "id": printable(dataset.hub_id),
            # the tasks of a benchmark are named by its maintainers; most have one for each configuration
            "task_id": printable(record.config.get("dataset_config") or "default"),
            **({} if dataset.revision is None else {"revision": printable(dataset.revision)}),
        },
        "value": value,
        "notes": f"{metric} on the {printable(split)} split{augmented}",
    }
    return {f"{EVAL_RESULTS}/{slug(dataset.hub_id)}.yaml": yaml.safe_dump([entry], sort_keys=False, width=120)}

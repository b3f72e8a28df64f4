"""MLflow: its tracking server or, if none is configured, a database in the run folder."""

from pathlib import Path
from typing import Any

from resnext_hub.trackers.tracker import TrackedRun, Tracker


class MLflow(Tracker):
    """Continues the run of the same name."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._steps: dict[str, set[int]] = {}
        self._own_store = False
        self._client: Any = None

    def start(self) -> None:
        """Find the run, or create it with its settings, which MLflow does not let change later."""
        import mlflow
        from accelerate.tracking import MLflowTracker

        artifacts = None
        self._own_store = not mlflow.is_tracking_uri_set()
        if self._own_store:
            folder = (self.run.folder / "mlflow").absolute()
            folder.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            artifacts = (folder / "artifacts").as_uri()
        tracker = MLflowTracker(self.run.project, logging_dir=artifacts, run_name=self.run.name)
        client = self._client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(tracker.experiment_name)
        name = f"attributes.run_name = '{self.run.name}'"
        found = [] if experiment is None else client.search_runs([experiment.experiment_id], name)
        if found:
            tracker.run_id = found[0].info.run_id
        tracker.start()
        self.accelerate = tracker
        if not found:
            tracker.store_init_configuration(dict(self.run.config))

    def has(self, name: str, step: int) -> bool:
        """Return whether the run had the value."""
        if name not in self._steps:
            history = self._client.get_metric_history(self.accelerate.tracker.info.run_id, name)
            self._steps[name] = {metric.step for metric in history}
        return step in self._steps[name]

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log an image file as an artifact, which replaces an earlier one of that name."""
        self.accelerate.log_artifact(str(path), str(Path(name).parent))

    def finish(self) -> None:
        """Close the run, and leave MLflow's configuration as it was."""
        import mlflow

        try:
            super().finish()
        finally:
            if self._own_store:
                mlflow.set_tracking_uri("")

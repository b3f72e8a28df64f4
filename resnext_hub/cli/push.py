"""`resnext-hub push`: upload a run's model folder, a study or a page to the Hub, in one commit."""

import argparse
from typing import TYPE_CHECKING, Any

from resnext_hub.cli.output import write
from resnext_hub.cli.parser import existing_path
from resnext_hub.errors import RequestError

if TYPE_CHECKING:
    from resnext_hub.hub.publish import Publication


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "run", type=existing_path, help="run folder, study folder or, with --space, folder of a demo page"
    )
    parser.add_argument(
        "--repo-id",
        metavar="OWNER/NAME",
        help="Hub repository (required unless --space is given); created if it does not exist",
    )
    parser.add_argument(
        "--space",
        metavar="OWNER/NAME",
        help="publish a page written by `resnext-hub demo --static` to this static Space; replaces --repo-id",
    )
    parser.add_argument("--license", help="license of the weights or the report (required), such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="create the repository as private if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument(
        "--overwrite-card",
        action="store_true",
        help="replace the README.md on the Hub even if it was edited there",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files without uploading them")


def run(options: argparse.Namespace) -> None:
    """Publish, and print the address and the files."""
    done = _publish(options)
    listing = "".join(f"    {size:>12,}  {name}\n" for name, size in done.files)
    if done.address is None:
        name = options.space or options.repo_id
        where = f"the private repository {name}" if options.private else name
        write(f"would upload to {where} in one commit:\n{listing}")
    elif done.changed:
        write(f"published and verified: {done.address}\n{listing}")
    else:
        write(f"already up to date: {done.address}\n")


def _publish(options: argparse.Namespace) -> "Publication":
    from resnext_hub.hub.publish import publish
    from resnext_hub.record import RunRecord
    from resnext_hub.run_folder import RunFolder
    from resnext_hub.study.plan import StudyFolder
    from resnext_hub.study.publish import publish_study

    how: dict[str, Any] = {
        "private": options.private,
        "create_pr": options.create_pr,
        "revision": options.revision,
        "dry_run": options.dry_run,
    }
    if options.space is not None:
        from resnext_hub.apps.space import publish_page

        if options.repo_id is not None:
            raise RequestError("--space and --repo-id are mutually exclusive; omit one of them")
        return publish_page(options.run, options.space, options.license, **how)
    study = StudyFolder(options.run)
    if study.config.is_file():
        return publish_study(study, options.repo_id, options.license, **how)
    folder = RunFolder(options.run)
    record = RunRecord.load(folder.record)
    return publish(folder.model, record, options.repo_id, options.license, **how, overwrite_card=options.overwrite_card)

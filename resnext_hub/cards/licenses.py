"""License IDs of the Hub (https://huggingface.co/docs/hub/repositories-licenses)."""

import difflib

from resnext_hub.errors import RequestError, hide_tokens, setting
from resnext_hub.text import printable

LICENSES = tuple(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
    bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl
    gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0
    ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905 - a list this long is more readable as words
)


def check_license(license: str) -> None:
    """Raise RequestError, with the closest IDs, unless the Hub knows a license.

    Raises:
        RequestError: If the ID is not in the Hub's list.
    """
    if license in LICENSES:
        return
    close = [known for known in LICENSES if known.startswith(license.lower())] if license else []
    close += [name for name in difflib.get_close_matches(license.lower(), LICENSES, cutoff=0.5) if name not in close]
    shown = setting("license", hide_tokens(printable(license))[:80])
    raise RequestError(
        f"{shown}: expected an ID from the Hub's list, such as {', '.join(close[:4] or ['apache-2.0', 'mit'])}; "
        "use 'other' for a license that is not listed"
    )

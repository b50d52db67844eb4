# SPDX-License-Identifier: Apache-2.0
"""`speq verify-file`: whether every tensor of an encoded file decodes to its checkpoint's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from speq.cli.options import complete_model
from speq.model.aliases import ALIASES


def run(
    file: Annotated[Path, typer.Argument(help="A file that speq encode has written.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint.",
            show_default="the one the file names",
            autocompletion=complete_model,
        ),
    ] = None,
) -> None:
    """Check that an encoded file decodes to its checkpoint's weights bit for bit."""
    from speq.model.encoded_file import read_encoded
    from speq.model.encoding import tensors_for
    from speq.model.loaders import load_model

    encoded = read_encoded(file)
    if model is None:
        source = encoded.source
        model = source if source in ALIASES else str(file.parent / source)
    loaded = load_model(model, decoding=False)
    count = len(tensors_for(loaded, encoded, file))
    print(f"verified: all {count} tensors of {file} decode to the bits of {loaded.name}")

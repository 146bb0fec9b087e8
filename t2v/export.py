"""Write a checkpoint in the format of others.

    python -m t2v.export checkpoint=experiments/base_256/runs/1a2b3c4d format=diffusers output=exported
    python -m t2v.export weights=modelscope:DIR format=diffusers output=exported

diffusers: a folder that TextToVideoSDPipeline loads. modelscope: the folder of ModelScope's own library. t2v: a checkpoint of one set of
weights, without what only a resume needs; the shipped model is one. conf/export.yaml has every option.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from pathlib import Path

from omegaconf import DictConfig

from t2v.configuration import dtype_of, entry

FORMATS = ("diffusers", "modelscope", "t2v")


def export(cfg: DictConfig) -> None:
    if cfg.format not in FORMATS:
        raise ValueError(f"format={cfg.format} is unknown; write format={' or format='.join(FORMATS)}")
    if (cfg.checkpoint is None) == (cfg.weights is None):
        raise ValueError("say what to export: checkpoint=PATH, or weights=diffusers:DIR or weights=modelscope:DIR (one of them)")
    output = Path(cfg.output)
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise ValueError(f"output={output} is not empty: give a new folder")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it reports at every import what it cannot do on this machine

    from t2v import checkpoint
    from t2v.models import diffusers_folder, modelscope_folder

    dtype = dtype_of(cfg.dtype)
    checkpoint.require_writable(output.parent)
    kind, folder = checkpoint.split_place(cfg.checkpoint or cfg.weights)
    if cfg.format == "t2v" and kind is not None:
        raise ValueError(f"format=t2v takes a checkpoint=PATH of t2v, not weights={cfg.weights}")
    options = {"autoencoder": cfg.autoencoder, "text_encoder": cfg.text_encoder}
    if kind is None:
        unet, frozen, card = checkpoint.read_model(folder, cfg.ema, **options)
        if cfg.format == "t2v":
            save = functools.partial(checkpoint.save_weights, unet, dtype=dtype)
            checkpoint.write(output, {checkpoint.UNET: save}, card)
            print(f"checkpoint written: {output}")
            return
        schedule = card.schedule
    else:
        model = checkpoint.read_foreign(kind, folder, **options)
        unet, frozen, schedule = model.unet, model.frozen, model.schedule
    write = diffusers_folder.write if cfg.format == "diffusers" else modelscope_folder.write
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write(unfinished, unet, frozen, schedule, dtype)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except Exception as error:
        if (refused := checkpoint.write_error(error, output)) is not None:  # a full disk
            raise refused from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{cfg.format} folder written: {output}")


main = entry("export")(export)

if __name__ == "__main__":
    main()

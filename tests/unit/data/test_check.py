from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lt2titan.config.section import ConfigError
from lt2titan.data.check import check_source, check_texts, is_same_text, validation_text
from lt2titan.data.config import DataConfig


def refusal(call: object, *arguments: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


def test_a_check_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    code = (
        "import sys; from lt2titan.data.check import check_texts; from lt2titan.data.config import DataConfig\n"
        f"check_texts(DataConfig(), ('files', {str(tmp_path)!r}), ('huggingface', {str(tmp_path)!r}))\n"
        "print({'torch', 'numpy', 'pyarrow', 'datasets', 'tokenizers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("section", ["training", "validation"])
def test_what_cannot_be_read_is_refused_by_its_whole_key(section: str, tmp_path: Path) -> None:
    data = DataConfig()
    unknown = refusal(check_source, data, "hugingface", "x", section)
    assert unknown.key == f"{section}.dataset"
    assert "did you mean 'huggingface'" in unknown.reason and "'python_docs', 'synthetic'" in unknown.reason
    for dataset in ("files", "huggingface"):
        assert refusal(check_source, data, dataset, "", section).key == f"{section}.dataset_path"
        missing = refusal(check_source, data, dataset, f"{tmp_path}/*.parquet", section)
        assert missing.key == f"{section}.dataset_path" and "no files match" in missing.reason
    (tmp_path / "notes.pdf").touch()
    assert "not a supported kind" in refusal(check_source, data, "files", f"{tmp_path}/notes.pdf", section).reason
    assert refusal(check_source, data, "synthetic", "corpus", section).key == f"{section}.dataset_path"
    (tmp_path / "a.jsonl").touch()
    check_source(data, "files", str(tmp_path), section)
    check_source(data, "huggingface", f"{tmp_path}/a.jsonl", section)
    check_source(data, "huggingface", "owner/name-on-the-hub", section)
    check_source(data, "python_docs", "", section)
    check_source(data, "synthetic", "7", section)


def test_only_a_hugging_face_dataset_streams() -> None:
    data = DataConfig(streaming=True)
    assert refusal(check_source, data, "python_docs", "", "training").key == "data.streaming"
    check_texts(data, ("huggingface", "owner/name"), ("python_docs", ""))  # validation need not


def test_nothing_to_validate_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    data = DataConfig(holdout_documents=0)
    training = ("files", f"{tmp_path}/a.jsonl")
    for validation in (training, ("files", f"{tmp_path}/../{tmp_path.name}/a.*"), ("huggingface", training[1])):
        assert refusal(check_texts, data, training, validation).key == "data.holdout_documents"
    check_texts(data, training, ("files", f"{tmp_path}/b.jsonl"))
    check_texts(data, training, None)
    streaming = DataConfig(holdout_documents=0, streaming=True)
    hub = ("huggingface", "owner/name")
    assert refusal(check_texts, streaming, hub, ("huggingface", "owner/other")).key == "data.holdout_documents"


def test_the_same_text_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert is_same_text(("files", "."), ("files", f"{tmp_path}/*.jsonl"))
    assert is_same_text(("files", "a.jsonl, b.jsonl"), ("huggingface", "./"))
    assert not is_same_text(("files", "a.jsonl"), ("files", "b.jsonl"))
    assert is_same_text(("python_docs", ""), ("python_docs", "unused"))
    assert is_same_text(("synthetic", ""), ("synthetic", "0")) and not is_same_text(
        ("synthetic", "1"), ("synthetic", "")
    )
    assert not is_same_text(("huggingface", "owner/a"), ("huggingface", "owner/b"))
    assert not is_same_text(("huggingface", "owner/a"), ("files", "a.jsonl"))


def test_a_validation_text_is_training_s_where_it_is_left_open() -> None:
    assert validation_text(("files", "a"), "", "") == ("files", "a")
    assert validation_text(("files", "a"), "files", "") == ("files", "a")
    assert validation_text(("files", "a"), "", "b") == ("files", "b")
    assert validation_text(("files", "a"), "python_docs", "") == ("python_docs", "")

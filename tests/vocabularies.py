"""Small vocabulary files of kinds that nobody ships in small."""

from __future__ import annotations

from pathlib import Path

SPECIAL = (
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "</n>",
    "</_>",
    "<root>",
    "<ans>",
    "<mask>",
    "<option>",
    "<unk_1>",
)
CHINESE = "的一是不了人我在有他这中大来上国个到说们你好世界语言模型今天气真问答北京首都翻译，。？！：；（）"
_TEXT = """
    the and ing er in on at he re is it of to you me my what who why how are can do not no yes ok
    sum plus equals answer question user hello world one two three prompt input inp put pro
    今天 天气 世界 语言 语言模型 模型 北京 首都 是不是 我们 你们 中国 中国人 人大 大人 说话 问答 翻译 天天
    好好 你好
    2+ 10 100 == => << >> </ <a a> ... —— ▁ ▁the
"""
WORDS = _TEXT.split()


def cpm_lines() -> list[str]:
    """Entries of a vocab.txt as CPM-Bee's: special ones, two written in letters, characters and words."""
    ascii_ = [chr(c) for c in range(33, 127)]
    return [*SPECIAL, *ascii_, *CHINESE, *WORDS]


def write_cpm(folder: Path, lines: list[str] | None = None) -> Path:
    """Write vocab.txt, with an empty line in it that stands for nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = lines or cpm_lines()
    text = "\n".join([*entries[:20], "", *entries[20:]]) + "\n"
    (folder / "vocab.txt").write_text(text, encoding="utf-8")
    return folder / "vocab.txt"

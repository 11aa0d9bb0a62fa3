"""The starter base of `evomerge knowledge new`: the competition's 8 classes with examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from evomerge.knowledge.read_base import read_knowledge
from evomerge.knowledge.records import Knowledge

SHIPPED = Path(__file__).with_name("examples_ja.yaml")

# class -> (description, max_new_tokens): answers that weigh, plan or tell a story are the longest
ABOUT = {
    "分析": ("分析 (analysis): 比較、原因、矛盾、傾向などを根拠とともに調べる課題。", 512),
    "創作": ("創作 (creative writing): 物語、詩、俳句、キャッチコピーなどを新しく作る課題。", 512),
    "抽出": ("抽出 (extraction): 与えられた文章から語や数値や要点を取り出す課題。", 256),
    "意見": ("意見 (opinion): 是非や好みについて、立場と理由を述べる課題。", 512),
    "解決": ("解決 (solution): 困りごとや目標に、実行できる手順や案を示す課題。", 512),
    "説明": ("説明 (explanation): 言葉、仕組み、出来事の意味を分かるように述べる課題。", 512),
    "役割": ("役割 (role play): 指定された人物になりきって話す課題。", 384),
    "計算": ("計算 (calculation): 式を立てて数や日時や確率を求める課題。", 384),
}

README = (
    ("evomerge", "Knowledge base of `evomerge infer --knowledge` / 知識ベース"),
    (
        "What it does",
        "Each task gets the class of the examples that are most like it, and is answered with that "
        "class's prompt and a few of its examples.\n"
        "課題ごとに、似た手本から種類を決め、その種類のプロンプトと手本で回答させます。",
    ),
    (
        "classes",
        "One row for each class: its name, what belongs to it, the system text, the prompt "
        "template, and the settings of its answers; an empty setting takes the run's value. A "
        "template must contain {input}. Braces other than the three named here are left "
        "unchanged.\n"
        "1行に1種類。テンプレートには {input} が必須です。空の設定には実行時の値が使われます。",
    ),
    (
        "Two ways to show examples",
        "A template without {examples}, as here: each example is a turn of the chat before the "
        "task, the template filled with its input and then its output as the answer; this works "
        "best with chat models. A template with {examples}: they are inserted there as text, "
        "指示: … 回答: …, in one turn with the task. The column examples says how many; 0 shows "
        "none.\n"
        "テンプレートに {examples} がなければ、手本は課題の前の対話として示されます。"
        "あれば、その位置に文章として入ります。",
    ),
    (
        "examples",
        "One row for each task with a good answer. Three or more for each class; the more varied "
        "they are, the better the classes can be told apart. An example that equals the task "
        "itself is never shown.\n1行に1つの手本。種類ごとに3つ以上。",
    ),
    (
        "documents",
        "Optional: texts to quote where a template contains {documents}, those nearest to the task "
        "first; the column documents of the sheet classes says how many.\n"
        "任意。テンプレートの {documents} に、課題に近い文書から順に引用されます。",
    ),
    (
        "Rules",
        "Columns may be in any order, and columns with other names are not read. Do not merge "
        "cells, do not use formulas (a text that begins with = is fine where the cell is formatted "
        "as text), do not hide sheets.\n"
        "列の順序は自由です。セルの結合、数式、シートの非表示は使えません。",
    ),
    (
        "Check",
        "evomerge knowledge check FILE  names every mistake by sheet, row and column.\n"
        "すべての誤りを場所とともに表示します。",
    ),
    (
        "Look",
        "evomerge infer --tasks TASKS --knowledge FILE --explain  shows each task's class and "
        "examples without answering.",
    ),
)


def starter() -> Knowledge:
    """The classes and examples of the base that ships, with descriptions and lengths."""
    base = read_knowledge(SHIPPED)
    classes = []
    for c in base.classes:
        description, max_new_tokens = ABOUT[c.name]
        classes.append(
            replace(
                c,
                description=c.description or description,
                max_new_tokens=c.max_new_tokens or max_new_tokens,
            )
        )
    return replace(base, classes=tuple(classes))

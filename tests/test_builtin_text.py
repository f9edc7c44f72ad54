"""Documentation in, English paragraphs out."""

from pretrain import builtin_text
from pretrain.builtin_text import (
    builtin_documents,
    builtin_files,
    prose_of_markup,
    strings_of_python,
)

DOCSTRING = """
Return the mean of the values along one axis of
the array, with the axis removed.

Parameters
----------
axis : int
    The axis along which the mean of the values is to be computed.

The sum is computed in the precision of the input, which
may lose digits. For example::

    x = sum(y for y in z)

>>> mean([1, 2])

=====  =====
head   body
=====  =====

.. versionadded:: 1.2
   Once upon a time there was a version of it.

* The first of the items has text
  on two lines of the file.
* See :class:`~a.b.Name` and ``code`` for what is on a line of its own.

A `link <http://x.y>`_ and [other](http://z) are in the text.

**Bold** and *soft* are two words of this rather long sentence about the product 2 * 3.

The last of the sentences is gone. It is used as follows:

the first of the words in this sentence is without a capital.

The last of the words in this sentence has no full stop

Number tensors float int double long short half byte char bool.

The x[i] = {a: b} of the <y> is in @z[j] and #k of the {q} | p.

Copyright of the text is with the authors of the program and the book.

Too short for it.
"""


def test_docstrings_keep_only_their_sentences() -> None:
    assert prose_of_markup(DOCSTRING) == [
        "Return the mean of the values along one axis of the array, with the axis removed.",
        "The sum is computed in the precision of the input, which may lose digits.",
        "The first of the items has text on two lines of the file.",
        "See Name and code for what is on a line of its own.",
        "A link and other are in the text.",
        "Bold and soft are two words of this rather long sentence about the product 2 * 3.",
        "The last of the sentences is gone.",
    ]


def test_strings_of_python_finds_what_ast_finds() -> None:
    long = "word " * 30
    source = f'''
"""{long}module"""
# it's a comment with a quote and """ more
a = '{long}single \\'quoted\\''
b = ("{long}"
     "joined")
c = f"{long}{{a}}"
d = "short"
e = r"""{long}raw \\d "quoted" """
'''
    ends = ["module", "single 'quoted'", "joined", 'raw \\d "quoted" ']
    assert list(strings_of_python(source)) == [long + end for end in ends]


def test_a_manual_reads_like_english(monkeypatch) -> None:
    files = list(builtin_files())
    assert len(files) == len(set(files))
    assert not any("test" in path.parent.name.split("_") for path in files)
    topics = [path for path in files if path.name == "topics.py"]
    monkeypatch.setattr(builtin_text, "builtin_files", lambda: topics)
    documents = list(builtin_documents())
    assert len(documents) > 20
    assert all(len(document) >= 400 for document in documents)
    assert any("\nAn assignment statement evaluates" in f"\n{text}" for text in documents)


def test_a_paragraph_comes_once(monkeypatch, tmp_path) -> None:
    same = "This sentence stands in both of the files and is read only once. " * 4
    first = "The first of the files has this sentence on its own subject. " * 4
    other = "The other of the files has that sentence on another subject. " * 8
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file, own in zip(files, (first, other), strict=True):
        file.write_text(f'"""{same}\n\n{own}\n\n{same}\n"""\n', "utf-8")
    monkeypatch.setattr(builtin_text, "builtin_files", lambda: files)
    assert list(builtin_documents()) == [f"{same.strip()}\n{first.strip()}", other.strip()]

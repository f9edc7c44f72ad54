"""Documentation in, English paragraphs out."""

import inspect
import textwrap

from pretrain import builtin_text
from pretrain.builtin_text import (
    builtin_documents,
    builtin_files,
    is_prose,
    plain_text,
    prose_of_markup,
    strings_of_python,
)

NUMPY_DOCSTRING = """
Return the mean of the values along one axis of
the array, with the axis removed.

Parameters
----------
axis : int
    The axis along which the mean of the values is to be computed.
out : ndarray
    The array into which the result of the sum is to be put.

Notes
-----
The sum is computed in the precision of the input, which
may lose digits. For example::

    x = sum(y for y in z)

The result is still an array of the same shape.

>>> mean([1, 2])
1.5

=====  =====
head   body
=====  =====

.. versionadded:: 1.2
   Once upon a time there was a version of it.

References
----------
.. [1] A book.
"""

GOOGLE_DOCSTRING = """Open the file and keep it open for as long as needed.

Args:
    path (str): Where the file is.
        It must be there before any of it is read.

Returns:
    The file.

The file is closed with the object that holds it:

* The first of the items has text
  on two lines of the file.
* The second of the items is on a line of its own.

```python
close()
```
"""


PARAGRAPHS = {
    NUMPY_DOCSTRING: [
        "Return the mean of the values along one axis of the array, with the axis removed.",
        "The sum is computed in the precision of the input, which may lose digits.",
        "The result is still an array of the same shape.",
    ],
    GOOGLE_DOCSTRING: [
        "Open the file and keep it open for as long as needed.",
        "The first of the items has text on two lines of the file.",
        "The second of the items is on a line of its own.",
    ],
}


def test_docstrings_keep_only_their_sentences() -> None:
    assert {markup: prose_of_markup(markup) for markup in PARAGRAPHS} == PARAGRAPHS


PLAIN = {
    "See :class:`~a.b.Name` and ``code`` here.": "See Name and code here.",
    "A `link <http://x.y>`_ and [other](http://z).": "A link and other.",
    "**Bold** and *soft* words, 2 * 3 * 4.": "Bold and soft words, 2 * 3 * 4.",
    "It holds. Use it as follows:": "It holds.",
}
PROSE = {
    "The value of the sum is kept in the first of the two arrays.": True,
    "the value of the sum is kept in the first of the two arrays.": False,
    "The value of the sum is kept in the first of the two arrays": False,
    "Number tensors float int double long short half byte char bool.": False,
    "The x[i] = {a: b} of the <y> is in @z[j] and #k of the {q} | p.": False,
    "Copyright of the text is with the authors of the program and the book.": False,
    "Too short for it.": False,
}


def test_inline_markup_goes_and_prose_is_told_from_the_rest() -> None:
    assert {markup: plain_text(markup) for markup in PLAIN} == PLAIN
    assert {paragraph: is_prose(paragraph) for paragraph in PROSE} == PROSE


def test_strings_of_python_finds_what_ast_finds() -> None:
    long = "word " * 30
    source = textwrap.dedent(
        f'''\
        """{long}module"""
        # it's a comment with a quote and """ more
        a = '{long}single \\'quoted\\''
        b = ("{long}"
             "joined")
        c = f"{long}{{a}}"
        d = "short"
        e = r"""{long}raw \\d "quoted" """
        '''
    )
    assert list(strings_of_python(source)) == [
        f"{long}module",
        f"{long}single 'quoted'",
        f"{long}joined",
        f'{long}raw \\d "quoted" ',
    ]
    real = inspect.getsource(inspect)
    assert inspect.cleandoc(next(strings_of_python(real))) == inspect.getdoc(inspect)


def test_a_manual_reads_like_english(monkeypatch) -> None:
    files = builtin_files()
    assert files == list(dict.fromkeys(files))
    assert not any("test" in path.parent.name.split("_") for path in files)
    topics = [path for path in files if path.name == "topics.py"]
    monkeypatch.setattr(builtin_text, "builtin_files", lambda: topics)
    documents = list(builtin_documents())
    assert len(documents) > 20
    assert all(len(document) >= 400 for document in documents)
    assert any("\nAn assignment statement evaluates" in f"\n{text}" for text in documents)
    text = "".join(documents)
    assert sum(char.isalpha() or char in " .,\n" for char in text) > 0.93 * len(text)


def test_a_paragraph_comes_once(monkeypatch, tmp_path) -> None:
    same = "This sentence stands in both of the files and is read only once. " * 4
    first = "The first of the files has this sentence on its own subject. " * 4
    other = "The other of the files has that sentence on another subject. " * 8
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file, own in zip(files, (first, other), strict=True):
        file.write_text(f'"""{same}\n\n{own}\n\n{same}\n"""\n', "utf-8")
    monkeypatch.setattr(builtin_text, "builtin_files", lambda: files)
    assert list(builtin_documents()) == [f"{same.strip()}\n{first.strip()}", other.strip()]

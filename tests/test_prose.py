"""Documentation in, English paragraphs out."""

import inspect
import textwrap

import pytest

from pretrain.prose import (
    builtin_files,
    documents_of_file,
    is_prose,
    paragraphs_of_markup,
    plain_text,
    strings_of_python,
)

NUMPY_DOCSTRING = """
Return the mean of the values along one axis of
the array, with the axis removed.

Parameters
----------
axis : int
    The axis along which the mean is to be computed.
out : ndarray
    Where the result is to be put.

Notes
-----
The sum is computed in the precision of the input, which
may lose digits::

    x = sum(y for y in z)

The result is still an array.

>>> mean([1, 2])
1.5

=====  =====
head   body
=====  =====

.. versionadded:: 1.2
   Once upon a time.

.. note:: Empty arrays have
   no mean.

References
----------
.. [1] A book.
"""

GOOGLE_DOCSTRING = """Open the file and keep it open.

Args:
    path (str): Where the file is.
        It must be there.

Returns:
    The file.

The file is closed with the object:

* a first item of text
  on two lines
* a second item

```python
close()
```
"""


def test_numpy_docstring_keeps_only_its_sentences() -> None:
    assert paragraphs_of_markup(NUMPY_DOCSTRING) == [
        "Return the mean of the values along one axis of the array, with the axis removed.",
        "The sum is computed in the precision of the input, which may lose digits:",
        "The result is still an array.",
        "Empty arrays have no mean.",
    ]


def test_google_docstring_keeps_only_its_sentences() -> None:
    assert paragraphs_of_markup(GOOGLE_DOCSTRING) == [
        "Open the file and keep it open.",
        "The file is closed with the object:",
        "a first item of text on two lines",
        "a second item",
    ]


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("See :class:`~a.b.Name` and ``code`` here.", "See Name and code here."),
        ("A `link <http://x.y>`_ and [other](http://z).", "A link and other."),
        ("**Bold** and *soft* words, 2 * 3 * 4.", "Bold and soft words, 2 * 3 * 4."),
        ("It holds. Use it as follows:", "It holds."),
    ],
)
def test_inline_markup(markup: str, plain: str) -> None:
    assert plain_text(markup) == plain


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("The value of the sum is kept in the first of the two arrays.", True),
        ("the value of the sum is kept in the first of the two arrays.", False),
        ("The value of the sum is kept in the first of the two arrays", False),
        ("Number tensors float int double long short half byte char bool.", False),
        ("The x[i] = {a: b} of the <y> is in @z[j] and #k of the {q} | p.", False),
        ("Copyright of the text is with the authors of the program and the book.", False),
        ("Too short for it.", False),
    ],
)
def test_prose_is_told_from_the_rest(paragraph: str, expected: bool) -> None:
    assert is_prose(paragraph) is expected


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


def test_strings_of_python_agrees_with_a_real_module() -> None:
    source = inspect.getsource(inspect)
    assert inspect.cleandoc(next(strings_of_python(source))) == inspect.getdoc(inspect)


def test_builtin_text_is_there_and_reads_like_english() -> None:
    files = builtin_files()
    assert files == list(dict.fromkeys(files))
    assert not any("test" in path.parent.name.split("_") for path in files)
    topics = next(path for path in files if path.name == "topics.py")
    paragraphs = [text for document in documents_of_file(topics) for text in document]
    assert any(text.startswith("An assignment statement evaluates") for text in paragraphs)
    letters = sum(char.isalpha() or char in " .," for text in paragraphs for char in text)
    assert letters > 0.93 * sum(map(len, paragraphs))

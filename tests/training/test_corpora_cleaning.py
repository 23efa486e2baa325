"""Cleaners of training data, on samples short enough to read."""

from __future__ import annotations

import struct
import zlib

import pytest

from training.corpora.books import chapters
from training.corpora.code import amalgamation, module
from training.corpora.errors import CorpusError
from training.corpora.lexicon import lexicon
from training.corpora.novels import novels
from training.corpora.prose import normalized, paragraphs
from training.corpora.scripture import plain, scripture
from training.corpora.source import Book
from training.corpora.speech import speech

LONG = "It was a long and quiet evening, and nobody in the house had anything to say about it. " * 5


class TestProse:
    def test_composes_letters_and_makes_quotation_marks_and_dashes_plain(self):
        assert normalized("“cafe\u0301”—it’s…\r\n") == '"caf\u00e9"--it\'s...\n'

    def test_drops_control_characters_but_keeps_tabs_and_newlines(self):
        assert normalized("a\x00b\x0cc\td\n\ufeff") == "abc\td\n"

    def test_joins_wrapped_lines_into_paragraphs(self):
        wrapped = "The first line of it\nis short, and  the\nsecond follows.\n\n  Another one.\n"
        assert paragraphs(wrapped) == ["The first line of it is short, and the second follows.", "Another one."]

    def test_puts_no_space_after_a_hyphen_or_a_dash_at_a_lines_end(self):
        assert paragraphs("a well-\nknown man--\nan old - \none") == ["a well-known man--an old - one"]

    def test_keeps_the_lines_of_verse(self):
        verse = "    Under the wide and starry sky,\n    Dig the grave and let me lie.\n"
        assert paragraphs(verse) == ["Under the wide and starry sky,\nDig the grave and let me lie."]

    def test_a_paragraph_wrapped_narrowly_is_not_verse(self):
        assert paragraphs("It was late when she\nspoke of it again, and\nnobody was listening.") == [
            "It was late when she spoke of it again, and nobody was listening."
        ]

    @pytest.mark.parametrize(
        "dropped",
        [
            "       *       *       *       *",
            "Name        State     Years\nWashington   Virginia   1789-1797",
            "CHAPTER I ........ 12\nCHAPTER II ....... 30",
            "┌──┬──┐\n│ a│ b│",
            "-----------------",
        ],
    )
    def test_drops_tables_and_ornaments(self, dropped):
        assert paragraphs(f"Before.\n\n{dropped}\n\nAfter.") == ["Before.", "After."]


class TestBooks:
    def test_parts_a_book_at_its_headings_and_drops_what_is_before_the_first(self):
        text = f"[A Book by Nobody]\n\nCONTENTS\n\nCHAPTER I\n\n{LONG}\n\nCHAPTER II. The Title\n\n{LONG}\n\nTHE END\n"
        first, second = chapters(Book(title="A Book", member="a.txt"), text)
        assert first.title == second.title == "A Book"
        assert first.text == LONG.strip()
        assert second.text == f"The Title\n\n{LONG.strip()}"

    def test_a_table_of_contents_makes_no_chapters(self):
        text = f"Chapter 1\n\nChapter 2\n\nChapter 1\n\n{LONG}"
        assert len(chapters(Book(title="A Book", member="a.txt"), text)) == 1

    def test_drops_boilerplate_notes_references_captions_and_emphasis(self):
        text = (
            "Chapter 1\n\nProduced by many volunteers\n\n[Illustration: a\ntall ship]\n\n"
            f"{LONG}He _never\nslept_[12] at all.*\n\n* Not once.\n\n=A label.=--Then this.\n\n"
            "This Project Gutenberg text is free.\n"
        )
        (chapter,) = chapters(Book(title="A Book", member="a.txt"), text)
        assert chapter.text == f"{LONG}He never slept at all.\n\nA label.--Then this."

    def test_takes_one_book_of_several_in_a_file_and_no_back_matter(self):
        wanted = f"Chapter 1\n\n{LONG}\n\nReferences\n\nBooks.\n\n"
        text = f"Chapter 1\n\nNot this. {LONG}\n*** START ***\n{wanted}*** END ***\nChapter 2\n\nNor this. {LONG}"
        book = Book(title="A Book", member="a.txt", begin="*** START ***", end="*** END ***", back_matter="References")
        assert [chapter.text for chapter in chapters(book, text)] == [LONG.strip()]

    def test_says_which_book_has_no_headings_or_borders(self):
        with pytest.raises(CorpusError, match=r"A Book: no line of a\.txt begins a chapter"):
            chapters(Book(title="A Book", member="a.txt"), LONG)
        with pytest.raises(CorpusError, match="A Book: its last line, 'END', is not in"):
            chapters(Book(title="A Book", member="a.txt", end="END"), LONG)


class TestScripture:
    MARKUP = (
        '<div type="book" osisID="Ruth" sID="1"/><milestone n="Ruth" type="x-usfm-h"/><title>Ruth</title>'
        '<div sID="2" type="x-p"/><chapter n="1" sID="3"/><w lemma="x">In</w> the days,<note>or years</note>'
        '<w>there</w> was a famine<note>n</note>. “Go.”He went.<div eID="2" type="x-p"/>'
        '<lg><l level="1">The first line,</l> <l level="2">the second &amp; last.</l></lg>'
    )

    def test_markup_becomes_paragraphs_and_lines_of_poetry_without_notes_and_titles(self):
        assert plain(self.MARKUP) == (
            'In the days, there was a famine. "Go." He went.\n\nThe first line,\nthe second & last.'
        )

    def test_each_block_of_the_module_is_a_book_and_what_precedes_the_book_is_left_out(self):
        markup = ('<div type="front"/>A preface.' + self.MARKUP).encode()
        packed = zlib.compress(markup)
        index = struct.pack("<III", 0, 0, 0) + struct.pack("<III", 2, len(packed), len(markup))
        (book,) = scripture(index, b"??" + packed, "Bible")
        assert book.title == "Bible: Ruth"
        assert book.text.startswith("In the days,")

    def test_a_broken_block_is_named(self):
        with pytest.raises(CorpusError, match="Bible: block 0 of the module cannot be unpacked"):
            list(scripture(struct.pack("<III", 0, 4, 9), b"none", "Bible"))


def serialized(*strings: str | None) -> bytes:
    """A character vector as R writes it, in the second version of its format."""
    value = b"X\n" + struct.pack(">III", 2, 0x40202, 0x20300) + struct.pack(">II", 16, len(strings))
    for string in strings:
        content = b"" if string is None else string.encode()
        value += struct.pack(">Ii", 9, -1 if string is None else len(content)) + content
    return len(value).to_bytes(4, "big") + zlib.compress(value)


def test_novels_are_read_from_the_vectors_of_an_r_package():
    database = serialized("EMMA", "", "Chapter 1", None) + serialized("é")
    assert list(novels(database)) == ["EMMA\n\nChapter 1", "é"]


def test_a_truncated_r_package_is_refused():
    with pytest.raises(CorpusError, match="ends in the middle of a value"):
        list(novels(serialized("EMMA" * 100)[:-8]))


def test_a_speech_loses_the_audience_and_keeps_its_words():
    document = speech(
        "data/1999_ann_b_smith_r.txt", "Thank  you. [Applause] It’s &amp; was (Laughter.) so. [p.5]\n".encode()
    )
    assert document.title == "State of the Union, 1999, Ann B Smith"
    assert document.text == "Thank you. It's & was so."


def test_a_lexicon_groups_entries_by_letter_without_lists_and_appendices():
    content = (
        "   Contents\n\n   :foo: /foo/\n\n   1. A thing; see {bar}.\n\n   2. Another\n   thing.\n\n"
        "   :fum: n.\n\n   More.\n\n   G\n\n   gag\n\n   glue\n\n   :gag: n.\n\n   Last.\n\n"
        "                 Part III. Appendices\n\n   Not an entry.\n"
    )
    first, second = lexicon(content, "Slang")
    assert first.text == "foo: 1. A thing; see bar.\n\n2. Another thing.\n\nfum: More."
    assert second.text == "gag: Last."


class TestCode:
    SOURCE = "def answer() -> int:\n    return value  # what was asked for\n" * 8

    def test_a_module_keeps_its_indentation_and_is_part_of_its_top_package(self):
        document = module("lib/email/mime/text.py", self.SOURCE.encode(), "Python", "lib")
        assert document is not None
        assert document.title == "Python email"
        assert document.text == self.SOURCE

    def test_a_module_by_itself_is_named_without_its_suffix(self):
        document = module("lib/calendar.py", self.SOURCE.replace("\n", "\r\n").encode(), "Python", "lib")
        assert document is not None
        assert document.title == "Python calendar"
        assert document.text == self.SOURCE

    @pytest.mark.parametrize("content", [b"import os\n", b"TABLE = [" + b"0x12, " * 200 + b"]\n", b"# \xe9\n" * 100])
    def test_stubs_tables_and_other_encodings_are_left_out(self, content):
        assert module("lib/a.py", content, "Python", "lib") is None

    def test_an_amalgamation_is_parted_into_its_files_stretches(self):
        body = "int line;\n" * 30
        text = (
            f"prologue\n/**** Begin file a.c ****/\n{body}/* first */\n"
            f"/**** Include b.h in the middle of a.c ****/\n/**** Begin file b.h ****/\n{body}/* inner */\n"
            f"/**** End of b.h ****/\n/**** Continuing where we left off in a.c ****/\n{body}/* rest */\n"
            f"/**** End of a.c ****/\nbetween\n/**** Begin file p.c ****/\n/* automatically generated */\n{body}"
        )
        ends = [document.text.splitlines()[-1] for document in amalgamation(text, "SQLite")]
        assert ends == ["/* first */", "/* inner */", "/* rest */"]
        with pytest.raises(CorpusError, match="no marks"):
            list(amalgamation(body, "SQLite"))

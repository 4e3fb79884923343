"""robots.txt against the examples of RFC 9309 and of Google's documentation, X-Robots-Tag against its own."""

from __future__ import annotations

import urllib.robotparser

import pytest

from dataset_tools.robots import MOST_BYTES, Robots, directives

SITE = "https://example.com"


# https://developers.google.com/crawling/docs/robots-txt/robots-txt-spec#path-matching and #order-of-precedence
@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("disallow: /fish", "/fish.html", False),
        ("disallow: /fish", "/fishheads/yummy.html", False),
        ("disallow: /fish", "/Fish.asp", True),
        ("disallow: /fish", "/catfish", True),
        ("disallow: /fish*", "/fish", False),
        ("disallow: /fish/", "/fish", True),
        ("disallow: /*.php", "/filename.php?parameters", False),
        ("disallow: /*.php", "/windows.PHP", True),
        ("disallow: /*.php$", "/folder/filename.php", False),
        ("disallow: /*.php$", "/filename.php?parameters", True),
        ("disallow: /fish*.php", "/fishheads/catfish.php?parameters", False),
        ("disallow: /fish*.php", "/Fish.PHP", True),
        ("allow: /p\ndisallow: /", "/page", True),
        ("allow: /folder\ndisallow: /folder", "/folder/page", True),
        ("allow: /page\ndisallow: /*.htm", "/page.htm", False),
        ("allow: /$\ndisallow: /", "/", True),
        ("allow: /$\ndisallow: /", "/page.htm", False),
        ("disallow: /", "/robots.txt", True),
        ("disallow:", "/page", True),
        ("disallow: /*a*b$", "/ab/ab", False),
        ("disallow: /aba*ba$", "/aba", True),
        ("disallow: *.jpg", "/x/y.jpg", False),
        ("disallow: /?q", "/?q=1", False),
    ],
)
def test_the_longest_rule_that_fits_decides(rules: str, path: str, allowed: bool) -> None:
    assert Robots(f"User-Agent: *\n{rules}\n".encode(), "mild").allow(SITE + path) is allowed


# RFC 9309, 2.2.2
@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz"),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https://foo.bar"),
        ("/foo/bar/\u30c4", "/foo/bar/%E3%83%84"),
        ("/foo/bar/%E3%83%84", "/foo/bar/%e3%83%84"),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz"),
        ("/foo/a b", "/foo/a%20b"),
    ],
)
def test_paths_are_compared_in_one_way_of_writing(pattern: str, path: str) -> None:
    assert not Robots(f"user-agent: *\ndisallow: {pattern}".encode(), "mild").allow(SITE + path)


# RFC 9309, 5.1
EXAMPLE = b"""
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Crawl-delay: 3
Disallow: /example/page.html

User-Agent: quxbot
"""


@pytest.mark.parametrize(
    ("agent", "allowed"),
    [
        ("mild", {"/publications/", "/other"}),
        ("FooBot", {"/example/page.html", "/example/allowed.gif"}),
        ("barbot", {"/example/allowed.gif", "/publications/", "/other", "/x.gif"}),
        ("bazbot", {"/example/allowed.gif", "/publications/", "/other", "/x.gif"}),
        ("quxbot", {"/example/page.html", "/example/allowed.gif", "/publications/", "/other", "/x.gif"}),
    ],
)
def test_each_robot_has_its_group(agent: str, allowed: set[str]) -> None:
    robots = Robots(EXAMPLE, agent)
    paths = ("/example/page.html", "/example/allowed.gif", "/publications/", "/other", "/x.gif")
    assert {path for path in paths if robots.allow(SITE + path)} == allowed


def test_a_group_may_name_a_robot_as_its_requests_do() -> None:
    """With a version, as owners copy it from their logs."""
    for name in ("mild/1.0", "Mild/1.0 (+https://example.org)", "mild"):
        rules = f"User-agent: {name}\nDisallow: /\n\nUser-agent: *\nAllow: /"
        assert not Robots(rules.encode(), "mild").allow(f"{SITE}/x")
    assert Robots(b"User-agent: mildew\nDisallow: /", "mild").allow(SITE + "/x")


def test_groups_of_one_robot_are_one_and_plain_files_mean_what_they_mean_to_the_standard_library() -> None:
    data = b"\xef\xbb\xbfUser-agent: mild # us\r\nDisallow: /a\r\n\r\nUser-agent: x\r\nDisallow: /\r\n\r\n"
    data += b"USER-AGENT: Mild\r\nDisallow: /b\r\nno rule\r\n\x00\xff: 1"
    robots = Robots(data, "mild")
    plain = urllib.robotparser.RobotFileParser()
    plain.parse(["User-agent: mild", "Disallow: /a", "Disallow: /b"])
    for path in ("/", "/a", "/a/b", "/b", "/c"):
        assert robots.allow(SITE + path) == plain.can_fetch("mild", SITE + path)


def test_hostile_rules_take_no_time_and_no_more_than_the_limit_is_read() -> None:
    stars = b"user-agent: *\ndisallow: /" + b"*a" * 20_000 + b"b$\n"
    assert Robots(stars, "mild").allow(SITE + "/" + "a" * 5_000)
    late = b"user-agent: *\n" + b"#" * MOST_BYTES + b"\ndisallow: /\n"
    assert Robots(late, "mild").allow(SITE + "/x")


@pytest.mark.parametrize(
    ("headers", "meant"),
    [
        ([], set()),
        (["noai"], {"noai"}),
        (["NoIndex, NoAI", "noimageai"], {"noindex", "noai", "noimageai"}),
        (["otherbot: noai, nofollow"], set()),
        (["Mild: noai"], {"noai"}),
        (["otherbot: noindex, mild: noai, nofollow"], {"noai", "nofollow"}),
        (
            ["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"],
            {"unavailable_after: 25 jun 2010 15:00:00 pst", "noai"},
        ),
        (
            ["unavailable_after: Friday, 25-Jun-2010 15:00:00 PST, noai"],
            {"unavailable_after: friday", "25-jun-2010 15:00:00 pst", "noai"},
        ),
    ],
)
def test_directives_hold_for_all_robots_or_for_the_named_one(headers: list[str], meant: set[str]) -> None:
    assert directives(headers, "mild") == meant

"""Private data: found in its real forms, not in numbers that resemble them, and never shown."""

import random
import re
import time

import pytest

from ft_service.data.gate.form import check_record
from ft_service.data.gate.private import excerpt, find_private, is_card_number, mask
from tests.data.gate.gate_cases import record


def private_codes(text: str) -> list[str]:
    return [code for code, _, _ in find_private(text)]


PEM = "MIIEpAIBAAKCAQEA0Zx9tQ7LaB3dE0f3a9c5eMIIEpAIBAAKCAQEA0Zx9tQ7LaB3d"
PRIVATE = {
    "taro.yamada@mail.co.jp": "private.email",
    "j.smith+news@gmail.com": "private.email",
    "ｔａｒｏ＠ｍａｉｌ．ｃｏ．ｊｐ": "private.email",
    "(212) 736-5000": "private.phone",
    "212-736-5000": "private.phone",
    "+1 212 736 5000": "private.phone",
    "+44 20 7946 0018": "private.phone",
    "090-1234-5678": "private.phone",
    "03-3456-7890": "private.phone",
    "０３－３４５６－７８９０": "private.phone",
    "+81-90-1234-5678": "private.phone",
    "03(3456)7890": "private.phone",
    "０３（３４５６）７８９０": "private.phone",
    "090ー1234ー5678": "private.phone",
    "212 736 5000": "private.phone",
    "4539 5787 6362 1486": "private.card",
    "5425-2334-3010-9903": "private.card",
    "3742 454554 00126": "private.card",
    "４５３９ ５７８７ ６３６２ １４８６": "private.card",
    "DE89 3704 0044 0532 0130 00": "private.iban",
    "GB82WEST12345698765432": "private.iban",
    "FR14 2004 1010 0505 0001 3M02 606": "private.iban",
    "ＤＥ８９３７０４００４４０５３２０１３０００": "private.iban",
    "123-45-6789": "private.ssn",
    "AKIAIOSFODNN7ABCDEFG": "private.key",
    "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLCJhZG1pbiI6dHJ1ZX0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0T": "private.key",
    "ghp_" + "a1B2" * 9: "private.key",
    "sk-proj-" + "Zx9t" * 5 + "_" + "q7L-" + "aB3dE" * 6: "private.key",
    "sk-" + "0f3a9c5e" * 4: "private.key",
    "hf_" + "AbCd" * 9: "private.key",
    f"-----BEGIN RSA PRIVATE KEY-----\n{PEM}\n{PEM[:20]}==\n-----END RSA PRIVATE KEY-----": "private.key",
}


@pytest.mark.parametrize("secret", PRIVATE)
@pytest.mark.parametrize("around", ["Ask {} today.", "連絡先は{}です。", "({})", "{}", "番号：{}、以上"])
def test_private_data_is_found_and_masked_in_any_context(secret: str, around: str) -> None:
    text = around.format(secret)
    assert private_codes(text) == [PRIVATE[secret]]
    assert secret not in mask(text)
    assert mask(text).startswith(around.split("{}")[0]) and mask(text).endswith(around.split("{}")[1])


@pytest.mark.parametrize(
    "text",
    [
        "48/2 = <<48/2=24>>24 clips, 1,200,000 people, $1234.56 and 3.14159",
        "4539 5787 6362 1487",  # the check digit is wrong
        "4111 1111 1111 1111 and AKIAIOSFODNN7EXAMPLE",  # published for trials
        "JAN 4901234567894, and 4539578763621486 grains of sand",
        "11 22 33 44 55 66 77 88",
        "clone git@github.com:a/b, 300-400-5000 or 300 400 5000 of them",
        "1234567890123456",
        "0000 0000 0000 0000",
        "In 2023-2024 and on 2024-11-23 at 10:30:00",
        "192.168.100.200 and version 10.15.7",
        "ISBN 978-3-16-148410-0",
        "user@example.com, name@sub.example.org",
        "call 555-0123 or (212) 555-0147",
        "@handle, a@b, foo@bar",
        "sk-learn, AKIA, ghp_short, hf_model",
        "sk-fading-circle-container-element-large, /sk-slovakia-travel-guide-for-first-time-visitors-2024",
        "It begins with -----BEGIN PRIVATE KEY----- and nothing else.",
        "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg...\n-----END PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        "from 4539 5787 6362 1486 2500 to 2600",  # a row of figures, though the check digit fits
        "levels of 4100 4205 5600 5800 and 5800 5600 4205 4100",  # figures in order, though the check digit fits
        "100-200-300個",
        "昭和64年1月7日、第123-456号",
    ],
)
def test_other_numbers_and_names_are_not_private(text: str) -> None:
    assert private_codes(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "My card is 4539578763621486.",
        "カード番号は4539578763621486です",
        "4539578763621486 12/29",
        "4539 5787 6362 1486 12/29",
        "4539 5787 6362 1486 123",
        "no. 1 4539 5787 6362 1486",
        "Visa 4539 5787 6362 1486 1229",
        "card 4100 4205 5600 5800",
    ],
)
def test_a_card_number_is_found_near_words_about_cards(text: str) -> None:
    assert private_codes(text) == ["private.card"] and "[card number]" in mask(text)
    assert not re.search(r"6362|4205", mask(text))


@pytest.mark.parametrize(
    ("text", "code", "secret"),
    [
        ("Her SSN is 123456789.", "private.ssn", "123456789"),
        ("Social Security no. 123 45 6789", "private.ssn", "123 45 6789"),
        ("マイナンバーは123456789018です", "private.my-number", "123456789018"),
        ("個人番号：１２３４ ５６７８ ９０１８", "private.my-number", "１２３４ ５６７８ ９０１８"),
        ("My Number: 1234-5678-9018", "private.my-number", "1234-5678-9018"),
        ("My password is hunter2, as ever.", "private.password", "hunter2"),
        ("The password for the admin account is Tr0ub4dor&3.", "private.password", "Tr0ub4dor&3"),
        ("user: anna, password: correct-H0rse!", "private.password", "correct-H0rse!"),
        ('The password was "sunshine".', "private.password", "sunshine"),
        ("Wi-Fi passcode: 48291736", "private.password", "48291736"),
        ("パスワードはSakura2024です。", "private.password", "Sakura2024"),
        ("暗証番号は4829です。", "private.password", "4829"),
        ("Pay to NL91 ABNA 0417 1643 00 BY MONDAY", "private.iban", "NL91 ABNA 0417 1643 00"),
    ],
)
def test_private_data_that_its_words_show_is_found(text: str, code: str, secret: str) -> None:
    found = list(find_private(text))
    assert [(one, text[start:end]) for one, start, end in found] == [(code, secret)]
    assert secret not in mask(text)
    assert private_codes(mask(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "DE88 3704 0044 0532 0130 00 and XX89370400440532013000",  # check digits; no such country
        "000-12-3456, 666-12-3456, 912-34-5678, 123-00-4567, 123-45-0000, 078-05-1120",  # never issued, or published
        "part 123456789, ISBN 0-306-40615-2, 12-34-5678",
        "SSN 987654321",
        "マイナンバーは123456789012です",  # the check digit is wrong
        "123456789018 yen, serial 1234 5678 9018",  # no word about it
        "Your password is incorrect. The password is required, and password is case-sensitive.",
        "Choose a password: at least 8 characters. The password is 8-16 characters long.",
        "password: str, password = get_password(), password=os.environ['PW1'], password: <your-password1>",
        "Password: ********, password is base64-encoded, password: ${DB_PASS1}, password: self.pass1",
        "パスワードは8文字以上です。パスワードを入力してください。パスワードはpassword123のようなものは避ける。",
        "The password was changed on 2024-11-23.",
    ],
)
def test_what_only_resembles_a_number_or_a_password_is_not_private(text: str) -> None:
    assert private_codes(text) == []


@pytest.mark.parametrize(
    ("text", "is_phone"),
    [
        ("03-1234-567", False),  # from 0 on: ten digits or more
        ("(03) 123-4567", False),
        ("03-1234-5678", True),
        ("(03) 1234-5678", True),
        ("+371 5 12 34", False),  # international: nine or more
        ("+372 512 3456", True),
        ("+372 912 3456", False),  # no country assigns these
        ("+1 123 456 7890", False),
        ("212-136-5000", False),
        ("0120-123-456", True),
        ("020 7946 0018", True),
        ("01632 960123", False),  # for fiction
    ],
)
def test_a_phone_number_has_enough_digits(text: str, is_phone: bool) -> None:
    assert private_codes(f"Call {text} now.") == (["private.phone"] if is_phone else [])


@pytest.mark.parametrize(
    "sign",
    [
        "eyJ-",
        "sk-",
        "1 ",
        "1-",
        "a@",
        "a.",
        "(0",
        "+1 ",
        "DE12 ",
        "password for a ",
        "pwd:a1",
        "-----BEGIN PRIVATE KEY-----",
        "é",
        "あ1",
    ],
)
def test_private_data_search_takes_linear_time(sign: str) -> None:
    times = []
    for count in (50_000, 200_000):
        began = time.process_time()
        list(find_private(sign * count))
        times.append(time.process_time() - began)
    assert times[1] < 12 * max(times[0], 0.05)  # four times as much; a quadratic search takes sixteen times


@pytest.mark.parametrize("line_end", ["\n", "\\n", "\r\n"])
def test_a_cut_off_key_is_found_and_masked(line_end: str) -> None:
    text = line_end.join(["The key:", "-----BEGIN PRIVATE KEY-----", PEM, PEM, PEM[:30]])
    assert private_codes(text) == ["private.key"]
    assert PEM[:8] not in mask(text) and mask(text).startswith("The key:")


def test_one_changed_digit_makes_a_card_number_invalid() -> None:
    good = "4539578763621486"
    assert is_card_number(good)
    for at in range(16):
        changed = good[:at] + str((int(good[at]) + 1) % 10) + good[at + 1 :]
        assert not is_card_number(changed)


def test_a_finding_never_shows_private_data() -> None:
    dice = random.Random(0)
    for secret, code in PRIVATE.items():
        filler = "words " * dice.randrange(30)
        hits = list(check_record(record("q?", f"{filler}{secret} {filler}")))
        assert [hit.code for hit in hits] == [code]
        assert (
            secret not in hits[0].excerpt and secret[:12] not in hits[0].excerpt and secret[-8:] not in hits[0].excerpt
        )


@pytest.mark.parametrize("at", range(0, 70, 7))
def test_an_excerpt_that_begins_inside_a_key_shows_none_of_it(at: int) -> None:
    secret = "ghp_" + "Qz7" * 12
    shown = excerpt(f"token {secret} and more words to follow after it", at)
    assert not any(secret[start : start + 6] in shown for start in range(len(secret) - 6))


def test_an_excerpt_is_short_and_on_one_line() -> None:
    shown = excerpt("line one\nline two " * 50, 300)
    assert len(shown) <= 82 and "\n" not in shown and shown.startswith("…") and shown.endswith("…")

"""The email tool: what it writes and sends, what it refuses, and that an email is sent once."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from agent_tools import ToolError, ToolUnavailable
from agent_tools.email import EmailSender

Patch = pytest.MonkeyPatch


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def read(path: str | Path) -> EmailMessage:
    message = message_from_bytes(Path(path).read_bytes(), policy=policy.default)
    assert isinstance(message, EmailMessage)
    return message


def test_email_becomes_a_file(outbox: Path, monkeypatch: Patch) -> None:
    """Without a server, a message with all that RFC 5322 asks for is in the outbox, and nothing beside it."""
    monkeypatch.setenv("MAIL_FROM", "robot@example.org")

    result = EmailSender(outbox, None).send("a@example.org", "Größe: 5 €", "Zeile eins\nZeile zwei ü\n")

    message = read(result["file"])
    assert message["From"] == "robot@example.org" and message["To"] == "a@example.org"
    assert message["Subject"] == "Größe: 5 €"
    assert message.get_content() == "Zeile eins\nZeile zwei ü\n"
    assert message["Date"].datetime and message["Message-ID"] == result["message_id"]
    assert [path.name for path in outbox.iterdir()] == [Path(result["file"]).name]


@pytest.mark.parametrize(
    "to",
    ["a@example.org, b@example.org", "Ann <a@example.org>,b@example.org"],
)
def test_several_recipients(outbox: Path, to: str) -> None:
    """Recipients have commas between them; names beside the addresses are left out."""
    result = EmailSender(outbox, None).send(to, "s", "b")

    assert read(result["file"])["To"] == "a@example.org, b@example.org"


def test_same_message_id_sends_once(outbox: Path) -> None:
    """A task that is tried again sends no second message, and learns what it learned the first time."""
    sender = EmailSender(outbox, None)

    first = sender.send("a@example.org", "s", "first", idempotency_key="task-7")
    content = Path(first["file"]).read_bytes()
    second = sender.send("a@example.org", "s", "second", idempotency_key="task-7")

    assert second == {**first, "already_sent": True}
    assert Path(first["file"]).name == "task-7.eml"
    assert Path(first["file"]).read_bytes() == content


def test_messages_without_id_are_all_sent(outbox: Path) -> None:
    """Two equal messages without message_id are two messages."""
    sender = EmailSender(outbox, None)

    files = {sender.send("a@example.org", "s", "b")["file"] for _ in range(2)}

    assert len(files) == 2


@pytest.mark.parametrize("message_id", ["../../evil", "/etc/passwd", "a\nBcc: x", "x" * 5000, "\ud800", ".."])
def test_message_id_cannot_leave_the_outbox(outbox: Path, message_id: str) -> None:
    """Whatever the id holds, it is one file in the outbox and one header."""
    result = EmailSender(outbox, None).send("a@example.org", "s", "b", idempotency_key=message_id)

    assert Path(result["file"]).resolve().parent == outbox.resolve()
    assert read(result["file"])["Bcc"] is None


def test_message_ids_that_look_alike_are_two(outbox: Path) -> None:
    """Ids that differ only in characters unfit for file names do not count as sent already."""
    sender = EmailSender(outbox, None)

    results = [
        sender.send("a@example.org", "s", "b", idempotency_key=message_id) for message_id in ("t/1", "t_1", "t 1")
    ]

    assert len({result["file"] for result in results}) == 3
    assert not any("already_sent" in result for result in results)


@pytest.mark.parametrize(
    "arguments",
    [
        {"subject": "x\r\nBcc: victim@example.org"},
        {"subject": "x\nBcc: victim@example.org"},
        {"subject": "x\u2028y"},
        {"subject": "\ud800"},
        {"subject": None},
        {"body": None},
        {"body": "\ud800"},
        {"body": {"text": "x"}},
        {"to": "a@example.org\nBcc: victim@example.org"},
        {"to": "a@example.org, b@example.org\r\nX: y"},
        {"to": "Ann\n <a@example.org>"},
        {"to": "nobody"},
        {"to": "a@b@c"},
        {"to": ""},
        {"to": []},
        {"to": [7]},
        {"to": None},
        {"to": "jürgen@example.org"},
        {"to": "<script>@example.org"},
        {"to": "a@example.org, nobody"},
        {"idempotency_key": 7},
    ],
)
def test_unfit_emails_are_refused(outbox: Path, arguments: dict[str, Any]) -> None:
    """Line breaks in headers, what is no address, and what is no text: a ToolError, and no file."""
    fit = {"to": "a@example.org", "subject": "s", "body": "b"}

    with pytest.raises(ToolError) as caught:
        EmailSender(outbox, None).send(**{**fit, **arguments})
    assert str(caught.value).isprintable()

    assert not outbox.exists()


def test_line_break_in_mail_from_is_refused(outbox: Path, monkeypatch: Patch) -> None:
    """The environment cannot add headers either."""
    monkeypatch.setenv("MAIL_FROM", "a@example.org\nBcc: victim@example.org")

    with pytest.raises(ToolError) as caught:
        EmailSender(outbox, None).send("a@example.org", "s", "b")
    assert str(caught.value).isprintable()


def test_outbox_that_cannot_be_written_is_unavailable(outbox: Path) -> None:
    """A full disk or a missing permission may pass: the task is tried again."""
    outbox.write_text("a file where the folder should be")

    with pytest.raises(ToolUnavailable, match="cannot write"):
        EmailSender(outbox, None).send("a@example.org", "s", "b", idempotency_key="task-7")


def test_failed_write_leaves_nothing(outbox: Path, monkeypatch: Patch) -> None:
    """When the disk is full halfway, neither the message nor a part of it stays."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agent_tools.email.os.fsync", full)

    with pytest.raises(ToolUnavailable, match="No space left"):
        EmailSender(outbox, None).send("a@example.org", "s", "b", idempotency_key="task-7")

    assert list(outbox.iterdir()) == []


class SMTPHandler(socketserver.StreamRequestHandler):
    """Speak as much SMTP as a client needs; `server.answers` overrides what is said to a command."""

    timeout = 10

    def handle(self) -> None:
        answers: dict[str, str] = self.server.answers  # type: ignore[attr-defined]
        self.say(answers.get("greeting", "220 ready"))
        while line := self.rfile.readline().decode().strip():
            command = line.split()[0].upper()
            self.server.commands.append(line)  # type: ignore[attr-defined]
            usual = {
                "EHLO": "250-me\r\n250 AUTH PLAIN",
                "AUTH": "235 welcome",
                "DATA": "354 go on",
                "QUIT": "221 bye",
            }
            answer = answers.get(line) or answers.get(command) or usual.get(command, "250 fine")
            if answer == "hang up":
                return
            self.say(answer)
            if answer.startswith("354"):
                lines = list(iter(self.rfile.readline, b".\r\n"))
                if answers.get("message") == "hang up":
                    return
                self.say(answers.get("message", "250 accepted"))
                self.server.messages.append(b"".join(lines))  # type: ignore[attr-defined]
            if command == "QUIT":
                return

    def say(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\r\n")


@contextmanager
def smtp_server(answers: dict[str, str] | None = None) -> Iterator[Any]:
    """A server on loopback, with .url, .commands and .messages; it answers one client at a time."""
    with socketserver.TCPServer(("127.0.0.1", 0), SMTPHandler) as server:
        server.answers, server.commands, server.messages = answers or {}, [], []  # type: ignore[attr-defined]
        server.url = f"smtp://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=60)


def test_smtp_server_gets_the_message(outbox: Path) -> None:
    """The server is told every recipient, and gets the message with its non-ASCII body."""
    with smtp_server() as server:
        EmailSender(outbox, server.url).send("a@example.org, b@example.org", "Grüße", "ü" * 2000)

    message = message_from_bytes(server.messages[0], policy=policy.default)
    assert isinstance(message, EmailMessage)
    assert message["Subject"] == "Grüße" and message.get_content().strip() == "ü" * 2000
    assert sum(command.upper().startswith("RCPT") for command in server.commands) == 2


def test_same_message_id_is_sent_by_smtp_once(outbox: Path) -> None:
    """The copy in the outbox is the memory of what the server has accepted."""
    with smtp_server() as server:
        sender = EmailSender(outbox, server.url)
        first = sender.send("a@example.org", "s", "b", idempotency_key="task-7")
        second = sender.send("a@example.org", "s", "b", idempotency_key="task-7")

    assert second == {**first, "already_sent": True}
    assert len(server.messages) == 1


@pytest.mark.parametrize("answer", ["421 too busy", "hang up"])
def test_accepted_message_is_sent_whatever_follows(outbox: Path, answer: str) -> None:
    """A server that answers badly to QUIT has the message: failing now would send it once more."""
    with smtp_server({"QUIT": answer}) as server:
        result = EmailSender(outbox, server.url).send("a@example.org", "s", "b", idempotency_key="task-7")

    assert Path(result["file"]).exists()


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({"greeting": "421 busy"}, ToolUnavailable),
        ({"greeting": "554 go away"}, ToolError),
        ({"MAIL": "451 later"}, ToolUnavailable),
        ({"MAIL": "550 no"}, ToolError),
        ({"RCPT": "450 mailbox busy"}, ToolUnavailable),
        ({"RCPT": "550 no such user"}, ToolError),
        ({"DATA": "451 later"}, ToolUnavailable),
        ({"DATA": "554 no"}, ToolError),
        ({"message": "452 full"}, ToolUnavailable),
        ({"message": "552 too large"}, ToolError),
        ({"MAIL": "hang up"}, ToolUnavailable),
        ({"message": "hang up"}, ToolUnavailable),
    ],
)
def test_smtp_refusals(outbox: Path, answers: dict[str, str], kind: type[Exception]) -> None:
    """5xx is for good, 4xx and a lost connection may pass; neither counts as sent."""
    with smtp_server(answers) as server, pytest.raises(kind) as caught:
        EmailSender(outbox, server.url).send("a@example.org", "s", "b", idempotency_key="task-7")

    assert type(caught.value) is kind
    assert str(caught.value).isprintable()
    assert not outbox.exists()


@pytest.mark.parametrize(
    ("answers", "may_have_happened"),
    [
        ({"greeting": "421 busy"}, False),
        ({"AUTH": "454 wait"}, False),
        ({"AUTH": "hang up"}, False),
        ({"RCPT": "450 mailbox busy"}, False),
        ({"DATA": "451 later"}, False),
        ({"message": "452 full"}, False),
        ({"message": "hang up"}, True),
    ],
)
def test_only_a_connection_that_breaks_during_the_message_leaves_a_doubt(
    outbox: Path, answers: dict[str, str], may_have_happened: bool
) -> None:
    """After all else it is certain that nothing was sent, so the task may be tried again without asking anybody."""
    with smtp_server(answers) as server, pytest.raises(ToolUnavailable) as caught:
        url = server.url.replace("smtp://", "smtp://user:password@")
        EmailSender(outbox, url).send("a@example.org", "s", "b", idempotency_key="task-7")

    assert caught.value.may_have_happened is may_have_happened


def test_some_refused_recipients_are_named(outbox: Path) -> None:
    """If the server takes the message for some, it is sent, and the result says for whom not."""
    with smtp_server({"rcpt TO:<b@example.org>": "550 no such user"}) as server:
        result = EmailSender(outbox, server.url).send("a@example.org, b@example.org", "s", "b")

    assert result["refused"] == ["b@example.org"]
    assert len(server.messages) == 1


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({"AUTH": "535 no pa$s/word"}, ToolError),
        ({"AUTH": "535 AHVzZXIAcGEkcy93b3Jk"}, ToolError),
        ({"AUTH": "454 wait, pa$s/word"}, ToolUnavailable),
        ({"MAIL": "550 pa$s/word"}, ToolError),
    ],
)
def test_password_is_sent_and_never_shown(outbox: Path, answers: dict[str, str], kind: type[Exception]) -> None:
    """The password of SMTP_URL goes to the server only, even if the server repeats it, as it is or in base64."""
    with smtp_server(answers) as server, pytest.raises(kind) as caught:
        url = server.url.replace("smtp://", "smtp://user:pa%24s%2Fword@")
        EmailSender(outbox, url).send("a@example.org", "s", "b")

    assert any(command.startswith("AUTH PLAIN") for command in server.commands)
    assert not any(word in str(caught.value) for word in ("pa$s", "pa%24s", "AHVzZX"))


def test_login_that_is_not_ascii_is_refused(outbox: Path) -> None:
    """smtplib cannot send such a login: a ToolError, in which (and behind which) no password stands."""
    with smtp_server() as server, pytest.raises(ToolError, match="UnicodeEncodeError") as caught:
        url = server.url.replace("smtp://", "smtp://user:gehe%C3%ADm@")
        EmailSender(outbox, url).send("a@example.org", "s", "b")

    assert "gehe" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert server.messages == []


@pytest.mark.parametrize("asked", ["starttls=yes", "starttls=true", "starttls=", "starttls"])
def test_misspelt_starttls_is_refused_before_connecting(outbox: Path, asked: str) -> None:
    """A wish for encryption that is not understood is not taken for "no": nothing is sent in the clear."""
    with smtp_server() as server, pytest.raises(ToolError, match="SMTP_URL is not like"):
        EmailSender(outbox, f"{server.url}?{asked}").send("a@example.org", "s", "b")

    assert server.commands == []


def test_starttls_that_is_not_offered_is_refused(outbox: Path) -> None:
    """A message (and a password) that should be encrypted is not sent in the clear."""
    with smtp_server() as server, pytest.raises(ToolUnavailable, match="SMTPNotSupportedError"):
        EmailSender(outbox, server.url + "?starttls=1").send("a@example.org", "s", "b")

    assert server.messages == []


def test_unreachable_server_is_unavailable(outbox: Path) -> None:
    """Nobody listens: another try makes sense."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen, so that connecting is refused
        port = probe.getsockname()[1]

        with pytest.raises(ToolUnavailable, match=f"smtp://127.0.0.1:{port}: ConnectionRefusedError"):
            EmailSender(outbox, f"smtp://u:secret@127.0.0.1:{port}").send("a@example.org", "s", "b")


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "host:25",
        "smtp://",
        "smtp://u:secret/x@host",
        "smtp://[::1",
        "smtp://h:99999",
        "smtp://h:0",
        "smtp://h:x",
    ],
)
def test_unfit_smtp_url_is_refused(outbox: Path, url: str) -> None:
    """The message shows what such a URL looks like, and nothing of this one: it may hold a password."""
    with pytest.raises(ToolError, match="SMTP_URL is not like") as caught:
        EmailSender(outbox, url).send("a@example.org", "s", "b")

    assert "secret" not in str(caught.value)

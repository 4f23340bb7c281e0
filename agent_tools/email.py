"""The email tool: plain text, through an SMTP server or as files in a folder."""

import hashlib
import os
import re
import smtplib
import ssl
import threading
from contextlib import suppress
from email.message import EmailMessage
from email.utils import formatdate, getaddresses, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from .base import Result, ToolError, ToolUnavailable, require_text

SMTP_SECONDS = 10.0  # for each step of the conversation
ADDRESS = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[A-Za-z0-9.-]{1,190}", re.ASCII)
LINE_BREAK = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # and all other control characters


class EmailSender:
    """Send plain-text email: through the SMTP server in smtp_url, or, without one, as files in `outbox`."""

    name = "email_sender"

    def __init__(self, outbox: Path, smtp_url: str | None) -> None:
        self.outbox = outbox
        self.smtp_url = smtp_url

    def send(self, to: str, subject: str, body: str, *, message_id: str | None = None) -> Result:
        """Send an email; `to` may be several addresses with commas between them.

        A second call with the same message_id sends nothing and says "already_sent".
        The file in the outbox is the memory of what was sent. Over SMTP, a crash between the server's yes and the
        writing of that file sends twice, with the same Message-ID: the recipient's server may notice.
        """
        message = compose(to, subject, body, message_id)
        number = str(message["Message-ID"])
        path = self.outbox / f"{safe_name(message_id or number.strip('<>'))}.eml"
        result = {"to": str(message["To"]), "subject": subject, "message_id": number, "file": str(path)}
        if message_id and path.exists():
            return {**result, "already_sent": True}
        if not self.smtp_url:
            write_whole(path, bytes(message))
            return result
        refused = send_by_smtp(message, self.smtp_url)
        with suppress(ToolUnavailable):  # it is sent: failing now would send it once more
            write_whole(path, bytes(message))
        return {**result, "refused": refused} if refused else result


def compose(to: Any, subject: Any, body: Any, message_id: Any) -> EmailMessage:
    """Return the message. Raises ToolError for anything that could become a header of its own or isn't an address."""
    recipients = to if isinstance(to, list) else [to]
    for text in recipients:
        require_text(to=text)
    require_text(subject=subject, body=body, message_id="" if message_id is None else message_id)
    if any(LINE_BREAK.search(text) for text in [subject, *recipients]):
        raise ToolError("a line break or control character in to or subject; remove it")
    addresses = [address for _, address in getaddresses(recipients)]
    for address in addresses or [""]:
        if not ADDRESS.fullmatch(address):
            raise ToolError(f"not an email address: {address or to!r:.200}; expected name@example.org")
    message = EmailMessage()
    try:
        message["From"] = os.environ.get("MAIL_FROM", "agent@localhost")
        message["To"] = ", ".join(addresses)
        message["Subject"] = subject
        message["Date"] = formatdate(localtime=True)
        known = f"<{safe_name(message_id)}@task-streams>" if message_id else None
        message["Message-ID"] = known or make_msgid(domain="task-streams")
        message.set_content(body)
        bytes(message)  # a text that can't be written shows now
    except ValueError as error:  # a line break in MAIL_FROM, half a surrogate pair in a text
        raise ToolError(f"cannot be written as an email: {error}") from error
    return message


def safe_name(text: str) -> str:
    """Return a file name for any text, different for different texts. "task/1" -> "task_1-e4f0a1c2" """
    name = re.sub(r"[^A-Za-z0-9.-]", "_", text)[:100]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ToolUnavailable(f"cannot write {path}: {error.strerror}; is the disk full?") from error


def parse_url(url: str) -> tuple[SplitResult, int, bool]:
    """Return an SMTP_URL's parts, its port, and whether it asks for STARTTLS. Its password is never quoted."""
    try:
        parts = urlsplit(url)
        asked = parse_qs(parts.query, True).get("starttls", ["0"])[-1]
        usual = 465 if parts.scheme == "smtps" else 587 if asked == "1" else 25
        port = usual if parts.port is None else parts.port
        (parts.hostname or "").encode("idna")  # as the socket does: "a..b" isn't a host
        # subtle: starttls=yes must not mean "no", which would send the password in the clear
        if parts.hostname and port and parts.scheme in ("smtp", "smtps") and asked in ("0", "1"):
            return parts, port, asked == "1" and parts.scheme == "smtp"
    except ValueError:  # subtle: its text may quote a part of the password
        pass
    raise ToolError("SMTP_URL is not like smtp://user:password@host:587?starttls=1 or smtps://host") from None


def send_by_smtp(message: EmailMessage, url: str) -> list[str]:
    """Hand a message to smtp://user:password@host:port?starttls=1 or smtps://…; return the refused recipients."""
    parts, port, starttls = parse_url(url)
    host, password = parts.hostname or "", unquote(parts.password or "")
    where = f"{parts.scheme}://{host}:{port}"
    tls = ssl.create_default_context()  # subtle: without it smtplib believes any certificate
    try:
        if parts.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=SMTP_SECONDS, context=tls)
        else:
            server = smtplib.SMTP(host, port, timeout=SMTP_SECONDS)
        try:
            if starttls:
                server.starttls(context=tls)
            if parts.username:
                server.login(unquote(parts.username), password)
            return list(server.send_message(message))
        finally:
            # subtle: not `with server`, which raises on a bad answer to QUIT, when the message is long sent
            with suppress(smtplib.SMTPException, OSError):
                server.quit()
    except UnicodeError:  # subtle: it holds the whole login; smtplib sends ASCII
        raise ToolError(f"{where}: user or password in SMTP_URL is not ASCII; change it") from None
    except smtplib.SMTPNotSupportedError as error:
        raise ToolError(f"{where}: {error}; change SMTP_URL") from None
    except smtplib.SMTPRecipientsRefused as error:
        codes = [code for code, _ in error.recipients.values()]
        who = f"{where} refused {', '.join(error.recipients)} ({codes[0]}); check the address"
        raise (ToolError if min(codes) >= 500 else ToolUnavailable)(who) from None
    except smtplib.SMTPResponseException as error:
        said = str(error.smtp_error, "utf-8", "replace") if isinstance(error.smtp_error, bytes) else ""
        if isinstance(error, smtplib.SMTPAuthenticationError):
            said = "to the login; check user and password"  # subtle: some servers repeat the password, or its base64
        said = said.replace(password, "***") if password else said
        kind = ToolError if error.smtp_code >= 500 else ToolUnavailable
        raise kind(f"{where} answered {error.smtp_code} {said}") from None
    except (smtplib.SMTPException, OSError) as error:
        raise ToolUnavailable(f"cannot reach {where}: {error}. Is SMTP_URL right, the server up?") from None

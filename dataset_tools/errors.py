"""The two kinds of bad news: what the user must mend, and what a run sets aside and goes on without."""

from __future__ import annotations

import errno
import os
import re


class UserError(ValueError):
    """Something that the user gave cannot be used: a settings file, a path, a table, an argument.

    The message is one line that names the file, row or field and says what to do. The command line
    prints it and exits with code 2.
    """


class Rejected(Exception):
    """One image or one person cannot be used; the run goes on without it.

    Args:
        reason: short stable code in kebab-case, such as ``truncated-image``; users filter
            ``rejected.parquet`` by it.
        message: what was found, for a person to read.
        transient: True where the fault may be the run's and not the image's (time-out, no permission, a folder that
            is missing as a whole): a later run tries again. False settles it: it is not there, or cannot be decoded.
    """

    def __init__(self, reason: str, message: str, *, transient: bool = False) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.transient = transient


def one_line(error: BaseException) -> str:
    """The error's kind and message, as a part of another's."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")


MENDABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # no permission
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),  # no such place can be
)
"""Numbers of `OSError` that are the same however often one tries, until the user has done something."""
_RUST = re.compile(r"\(os error (\d+)\)")
"""How libraries that are written in Rust, such as safetensors, name the system's error in their own."""


_RENEW = "renew the credentials and start again, what is finished is kept"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION to that"
_CREDENTIALS = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"), _RENEW),
    **dict.fromkeys(("InvalidToken", "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"), _RENEW),
    **dict.fromkeys(("LoginTokenLoadError", "CredentialRetrievalError", "RefreshError"), _RENEW),
    "InvalidAccessKeyId": "the store does not know AWS_ACCESS_KEY_ID, or the profile's key: correct it",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY, or the profile's, does not belong to the key: correct it",
    "RequestTimeTooSkewed": "set this machine's clock",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "ClientAuthenticationError": "correct or renew the credentials",
    "DefaultCredentialsError": "name credentials in GOOGLE_APPLICATION_CREDENTIALS",
    # Answers to HEAD have no words, and s3fs asks so before it reads.
    "400": f"the store does not say why, as where credentials have expired: {_RENEW}",
}
"""What S3 answers, or botocore, google-auth and azure-core raise, to whoever may ask for nothing, and the cure."""
_PLACES = {
    "AccessDenied": "give these credentials the permission, or use others",
    "403": "give these credentials the permission (to list the bucket, too), or use others",
    "NoSuchBucket": "make the bucket first, or correct its name",
    **dict.fromkeys(("PermanentRedirect", "301", "AuthorizationHeaderMalformed"), _REGION),
    "IllegalLocationConstraintException": _REGION,
}
"""What S3 answers to whoever may ask for other things, and the cure."""


def credentials_to_mend(error: BaseException) -> str | None:
    """One line where a store refuses whoever asks, whatever it is asked for; None for all other errors."""
    return _refusal(error, _CREDENTIALS)


def _refusal(error: BaseException, cures: dict[str, str]) -> str | None:
    """What a store's library said, what it was about to do, and the cure."""
    link: BaseException | None = error
    while link is not None:
        answer = getattr(link, "response", None)
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else type(link).__name__
        if cure := cures.get(str(code)):
            doing = f" ({link.operation_name})" if hasattr(link, "operation_name") else ""
            return f"{' '.join(str(error).split())}{doing}: {cure}"
        link = link.__cause__
    return None


def what_to_mend(error: BaseException) -> str | None:
    """One line on what the user must mend, where the error is of that kind; None for all others.

    Of that kind are `UserError`, and refusals of the system or a store: no room, no permission, a place that cannot be,
    credentials that do not hold.
    """
    if isinstance(error, UserError):
        return str(error)
    if refusal := _refusal(error, _CREDENTIALS | _PLACES):
        return refusal
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := _RUST.search(str(error))):
        code = int(found[1])
    if code is None and isinstance(error, PermissionError):  # as stores raise it
        code = errno.EACCES
    if code not in MENDABLE:
        return None
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    said = os.strerror(code) if names or not isinstance(error, PermissionError) else " ".join(str(error).split())
    room = ": make room and start again, what is finished is kept" if code in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{' -> '.join(names)}: {said}{room}" if names else f"{said}{room}"

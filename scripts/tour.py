#!/usr/bin/env python3
"""The tour of the README as a program, against a running Tollkeeper.

Registers a user, follows one token through validation, metering, the kill switch and refresh, and
says of each step whether it went as promised. Exit code 1 at the first surprise.

It knows the types only by server reflection, so it shows as well what any gRPC client can do
without generated code.
"""

import argparse
import os
import secrets
import sys
import uuid
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

# What the user spends: model, then tokens by dimension.
USAGE = [
    ("mistral-large", {"input": 1200, "output": 300, "cached_input": 500}),
    ("gpt-5", {"input": 800, "output": 150, "reasoning": 50}),
    ("llama-70b", {"input": 400, "output": 100, "cache_write": 60}),
]


class Surprise(Exception):
    """An answer other than the one promised."""


class Tollkeeper:
    """Calls any RPC by name, with types learned by reflection."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address)
        self.pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def call(self, rpc, bearer=None, **fields):
        """Calls `auth.v1.AuthService/Login`, say; raises grpc.RpcError when refused."""
        service, method = f"tollkeeper.{rpc}".split("/")
        types = self.pool.FindServiceByName(service).methods_by_name[method]
        request = message_factory.GetMessageClass(types.input_type)()
        invoke = self.channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(types.output_type).FromString,
        )
        metadata = [("authorization", f"Bearer {bearer}")] if bearer else []
        return invoke(json_format.ParseDict(fields, request), metadata=metadata, timeout=10)

    def refusal(self, rpc, bearer=None, **fields):
        """Calls an RPC that must be refused; returns status code and reason."""
        try:
            self.call(rpc, bearer, **fields)
        except grpc.RpcError as error:
            return f"{error.code().name}, {reason(error)}"
        raise Surprise(f"{rpc} was accepted")


def reason(error):
    """The machine-readable reason that every error of the service carries."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return "no reason"


@contextmanager
def step(title):
    """One line of the tour; yields the list of notes to print behind the title."""
    notes = []
    try:
        yield notes
    except (grpc.RpcError, Surprise) as error:
        if isinstance(error, grpc.RpcError):
            error = f"{error.code().name}, {reason(error)}: {error.details()}"
        print(f"  failed  {title}: {error}")
        sys.exit(1)
    print(f"  ok      {title:<32}{', '.join(notes)}".rstrip(), flush=True)


def expect(what, actual, wanted):
    if actual != wanted:
        raise Surprise(f"{what} is {actual!r}, expected {wanted!r}")


def tour(service, key, admin_identifier, admin_password):
    name = f"tour-{secrets.token_hex(4)}"
    password = secrets.token_urlsafe(18)

    with step("register") as notes:
        user = service.call(
            "auth.v1.AuthService/Register",
            email=f"{name}@example.com",
            username=name,
            full_name="On Tour",
            password=password,
        ).user
        notes += [name, f"tier {user.tier}"]

    with step("log in") as notes:
        first = service.call(
            "auth.v1.AuthService/Login", identifier=name, password=password
        ).tokens
        expires = first.access_token_expires_at.ToDatetime()
        notes.append(f"access token until {expires:%H:%M} UTC")

    def validate(token):
        answer = service.call("auth.v1.AuthService/ValidateToken", key, token=token)
        expect("the token's user", answer.user_id, user.id)
        return f"{answer.username}, tier {answer.tier}"

    def refusal(token):
        return service.refusal("auth.v1.AuthService/ValidateToken", key, token=token)

    with step("validate the token") as notes:
        notes.append(validate(first.access_token))

    for model, tokens in USAGE:
        with step("record usage") as notes:
            event = {
                "event_id": str(uuid.uuid4()),
                "occurred_at": datetime.now(timezone.utc).isoformat(),
                "user_id": user.id,
                "model": model,
                "tokens": tokens,
            }
            service.call("usage.v1.UsageService/RecordUsage", key, event=event)
            # A retry, as after a lost answer; the sums below show that it did not count.
            service.call("usage.v1.UsageService/RecordUsage", key, event=event)
            notes.append(f"{model}, {sum(tokens.values())} tokens, sent twice")

    spent = {model: sum(tokens.values()) for model, tokens in USAGE}
    with step("read the monthly usage") as notes:
        usage = service.call("usage.v1.UsageService/GetMonthlyUsage", first.access_token)
        by_model = {entry.model: entry.totals.total_tokens for entry in usage.models}
        expect("the usage by model", by_model, spent)
        expect("the total", usage.totals.total_tokens, sum(spent.values()))
        expect("the number of requests", usage.totals.request_count, len(USAGE))
        notes.append(f"{usage.month}: {usage.totals.total_tokens} tokens")

    with step("check the quota") as notes:
        answer = service.call(
            "usage.v1.UsageService/CheckQuota", key, user_id=user.id, tokens=1000
        )
        decision = answer.DESCRIPTOR.fields_by_name["decision"].enum_type.values_by_number
        expect("the decision", decision[answer.decision].name, "DECISION_ALLOWED")
        expect("what is used", answer.quota.used_tokens, sum(spent.values()))
        notes.append(f"{answer.quota.remaining_tokens} of {answer.quota.limit_tokens} left")

    with step("hold tokens for a request") as notes:
        held = service.call(
            "usage.v1.UsageService/ReserveQuota",
            key,
            user_id=user.id,
            request_id=str(uuid.uuid4()),
            model=USAGE[0][0],
            tokens=4000,
        )
        expect("what is held", held.tokens, 4000)
        notes.append(f"{held.tokens} tokens until {held.expires_at.ToDatetime():%H:%M:%S} UTC")

    with step("book what it used") as notes:
        used = {"input": 900, "output": 1200}
        for outcome in "OUTCOME_RECORDED", "OUTCOME_DUPLICATE":
            # A retry, as after a lost answer.
            answer = service.call(
                "usage.v1.UsageService/CommitReservation",
                key,
                reservation=held.reservation,
                tokens=used,
            )
            outcomes = answer.DESCRIPTOR.fields_by_name["outcome"].enum_type.values_by_number
            expect("the outcome", outcomes[answer.outcome].name, outcome)
        usage = service.call("usage.v1.UsageService/GetMonthlyUsage", first.access_token)
        total = sum(spent.values()) + sum(used.values())
        expect("the total", usage.totals.total_tokens, total)
        notes.append(f"{sum(used.values())} tokens, sent twice")

    with step("log in as administrator"):
        admin = service.call(
            "auth.v1.AuthService/Login", identifier=admin_identifier, password=admin_password
        ).tokens.access_token

    with step("disable the user"):
        service.call("admin.v1.AdminService/DisableUser", admin, user_id=user.id, reason="tour")

    with step("the same token is refused") as notes:
        notes.append(refusal(first.access_token))
        expect("the refusal", notes[0], "UNAUTHENTICATED, ACCOUNT_DISABLED")

    with step("enable the user"):
        service.call("admin.v1.AdminService/EnableUser", admin, user_id=user.id)

    with step("the same token is accepted") as notes:
        notes.append(validate(first.access_token))

    with step("refresh, and once more") as notes:
        latest = first
        for _ in range(2):
            latest = service.call(
                "auth.v1.AuthService/RefreshTokens", refresh_token=latest.refresh_token
            ).tokens
            expect("the session", latest.session_id, first.session_id)
        notes.append(validate(latest.access_token))

    with step("replay the first refresh token") as notes:
        replay = service.refusal(
            "auth.v1.AuthService/RefreshTokens", refresh_token=first.refresh_token
        )
        notes.append(replay)
        expect("the refusal", replay, "UNAUTHENTICATED, REFRESH_TOKEN_REUSED")

    with step("which ended the session") as notes:
        notes.append(refusal(latest.access_token))
        expect("the refusal", notes[0], "UNAUTHENTICATED, SESSION_ENDED")


def first_run(path):
    """The credentials that a first start of the service leaves in its data folder."""
    return dict(line.split("=", 1) for line in Path(path).read_text().splitlines() if "=" in line)


def main():
    env = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port of the service")
    parser.add_argument("--first-run", metavar="FILE", help="take the credentials from this file")
    parser.add_argument("--service-key", default=env("TOLLKEEPER_SERVICE_KEY"))
    parser.add_argument("--admin-identifier", default=env("TOLLKEEPER_ADMIN_IDENTIFIER"))
    parser.add_argument("--admin-password", default=env("TOLLKEEPER_ADMIN_PASSWORD"))
    args = parser.parse_args()

    known = first_run(args.first_run) if args.first_run else {}
    key = args.service_key or known.get("service_key")
    identifier = args.admin_identifier or known.get("admin_email")
    password = args.admin_password or known.get("admin_password")
    if not (key and identifier and password):
        parser.error("needs --first-run, or --service-key, --admin-identifier, --admin-password")

    tour(Tollkeeper(args.address), key, identifier, password)


if __name__ == "__main__":
    main()

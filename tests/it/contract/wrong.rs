//! The table of wrong values: each row is right but for one field.

pub(super) mod importing;
mod mfa;
mod people;

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message;
use prost_types::Timestamp;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        ClearQuotaOverrideRequest, CreateServiceAccountRequest, CreateUserRequest,
        DisableServiceAccountRequest, DisableUserRequest, EnableUserRequest, GetUserRequest,
        GrantCreditsRequest, ListCreditsRequest, ListServiceAccountsRequest, ListUsersRequest,
        LookupUserRequest, RotateServiceKeyRequest, SetQuotaOverrideRequest, SetUserTierRequest,
        VoidCreditsRequest, create_user_request::Credential, lookup_user_request::By,
        set_quota_override_request::Limit,
    },
    auth::v1::{
        BatchValidateTokensRequest, CreateApiKeyRequest, ListApiKeysRequest, LoginRequest,
        MinFreshness, RefreshTokensRequest, RegisterRequest, RevokeApiKeyRequest,
        ValidateTokenRequest, min_freshness::AtLeast,
    },
    usage::v1::{
        BatchRecordUsageRequest, CheckQuotaRequest, CommitReservationRequest, ExportUsageRequest,
        ExtendReservationRequest, GetMonthlyUsageRequest, GetQuotaRequest, ListUsageRecordsRequest,
        QueryUsageRequest, RecordUsageRequest, ReserveQuotaRequest, StreamUsageRequest,
        TokenCounts, UsageEvent,
        query_usage_request::{GroupBy, Interval},
    },
};
use uuid::Uuid;

use crate::harness::{PASSWORD, TestUser};

/// A request with one wrong field.
pub(super) struct Wrong {
    /// `auth.v1.AuthService/Register`.
    pub(super) rpc: &'static str,
    /// As an error names it.
    pub(super) field: String,
    /// What must not be repeated.
    pub(super) value: String,
    pub(super) message: Bytes,
}

pub(super) const REGISTER: &str = "auth.v1.AuthService/Register";
pub(super) const LOGIN: &str = "auth.v1.AuthService/Login";
pub(super) const REFRESH: &str = "auth.v1.AuthService/RefreshTokens";
pub(super) const VALIDATE: &str = "auth.v1.AuthService/ValidateToken";
pub(super) const CREATE_KEY: &str = "auth.v1.AuthService/CreateApiKey";
pub(super) const KEYS: &str = "auth.v1.AuthService/ListApiKeys";
pub(super) const REVOKE_KEY: &str = "auth.v1.AuthService/RevokeApiKey";
pub(super) const BATCH: &str = "auth.v1.AuthService/BatchValidateTokens";
pub(super) const RECORD: &str = "usage.v1.UsageService/RecordUsage";
pub(super) const RECORD_BATCH: &str = "usage.v1.UsageService/BatchRecordUsage";
pub(super) const RECORD_STREAM: &str = "usage.v1.UsageService/StreamUsage";
pub(super) const CHECK: &str = "usage.v1.UsageService/CheckQuota";
pub(super) const RESERVE: &str = "usage.v1.UsageService/ReserveQuota";
pub(super) const EXTEND: &str = "usage.v1.UsageService/ExtendReservation";
pub(super) const COMMIT: &str = "usage.v1.UsageService/CommitReservation";
pub(super) const QUOTA: &str = "usage.v1.UsageService/GetQuota";
pub(super) const MONTH: &str = "usage.v1.UsageService/GetMonthlyUsage";
pub(super) const RECORDS: &str = "usage.v1.UsageService/ListUsageRecords";
pub(super) const QUERY: &str = "usage.v1.UsageService/QueryUsage";
pub(super) const EXPORT: &str = "usage.v1.UsageService/ExportUsage";
pub(super) const CREATE_USER: &str = "admin.v1.AdminService/CreateUser";
pub(super) const GET_USER: &str = "admin.v1.AdminService/GetUser";
pub(super) const LOOKUP: &str = "admin.v1.AdminService/LookupUser";
pub(super) const USERS: &str = "admin.v1.AdminService/ListUsers";
pub(super) const SET_TIER: &str = "admin.v1.AdminService/SetUserTier";
pub(super) const ENABLE: &str = "admin.v1.AdminService/EnableUser";
pub(super) const DISABLE: &str = "admin.v1.AdminService/DisableUser";
pub(super) const CREATE_SERVICE: &str = "admin.v1.AdminService/CreateServiceAccount";
pub(super) const SERVICES: &str = "admin.v1.AdminService/ListServiceAccounts";
pub(super) const DISABLE_SERVICE: &str = "admin.v1.AdminService/DisableServiceAccount";

pub(super) const ROTATE: &str = "admin.v1.AdminService/RotateServiceKey";

pub(super) const OVERRIDE: &str = "admin.v1.AdminService/SetQuotaOverride";
pub(super) const CLEAR: &str = "admin.v1.AdminService/ClearQuotaOverride";
pub(super) const GRANT: &str = "admin.v1.AdminService/GrantCredits";
pub(super) const CREDITS: &str = "admin.v1.AdminService/ListCredits";
pub(super) const VOID: &str = "admin.v1.AdminService/VoidCredits";

const IDS: &[&str] = &[
    "",
    "nobody",
    "00000000-0000-0000-0000-000000000000",
    "01890a5dac96774bbcceb302099a8057",
    "{01890a5d-ac96-774b-bcce-b302099a8057}",
    "01890a5d-ac96-774b-bcce-b302099a805\u{0}",
];
const MONTHS: &[&str] = &[
    "2026",
    "2026-13",
    "2026-00",
    "2026-1",
    "26-01",
    "2026-01-01",
    "1999-12",
    "2200-01",
    "+026-01",
    "２０２６-01",
];
const EMAILS: &[&str] = &[
    "",
    "nobody",
    "a@b",
    "a b@c.de",
    "ü@b.co",
    "a@b.co\u{0}",
    "a@b@c.de",
];
const USERNAMES: &[&str] = &["", "ab", "-abc", "a b c", "name@host", "ünther", "abc\u{0}"];
const FULL_NAMES: &[&str] = &["line\nbreak", "nul\u{0}name", "escape\u{1b}[2J"];
const PASSWORDS: &[&str] = &["", "short-elev1", "twelve\u{0}chars and more"];
const PAGE_TOKENS: &[&str] = &["garbage", "!!!!", "AAAAAAAAAAAAAAAAAAAAAAAAAAA", "dG9rZW4="];
const REVISIONS: &[&str] = &[
    "",
    "7",
    "00000016B3748D80",
    "+0000016b3748d80",
    "00000016b3748d80\u{0}",
];
const MODELS: &[&str] = &["a model", "mödel", "model\u{0}"];
const TIERS: &[&str] = &["Free", "no tier", "free\u{0}", "9tier"];

/// Rows for every field of every request.
pub(super) fn rows(user: &TestUser) -> Vec<Wrong> {
    let mut table = Table::default();
    auth(&mut table);
    usage(&mut table, user);
    reservations(&mut table, user);
    admin(&mut table, user);
    limits(&mut table, user);
    people::sessions(&mut table, user);
    people::own_account(&mut table);
    people::accounts(&mut table, user);
    people::audit_trail(&mut table);
    importing::batches(&mut table);
    mfa::mfa(&mut table, user);
    table.0
}

fn auth(t: &mut Table) {
    t.texts(REGISTER, "email", EMAILS, |email| RegisterRequest {
        email,
        ..register()
    });
    t.texts(REGISTER, "username", USERNAMES, |username| {
        RegisterRequest {
            username,
            ..register()
        }
    });
    t.texts(REGISTER, "full_name", FULL_NAMES, |full_name| {
        RegisterRequest {
            full_name,
            ..register()
        }
    });
    t.texts(REGISTER, "password", PASSWORDS, |password| {
        RegisterRequest {
            password,
            ..register()
        }
    });

    let login = |identifier: String, password: &str| LoginRequest {
        identifier,
        password: password.to_owned(),
    };
    let identifiers = &["", "ab", "a b c", "a@b", "nul\u{0}nul"];
    t.texts(LOGIN, "identifier", identifiers, |text| {
        login(text, PASSWORD)
    });
    let long = "x".repeat(1025);
    t.texts(LOGIN, "password", &["", &long], |text| {
        login("someone".to_owned(), &text)
    });
    t.texts(REFRESH, "refresh_token", &[""], |refresh_token| {
        RefreshTokensRequest { refresh_token }
    });
    t.texts(VALIDATE, "token", &[""], |token| ValidateTokenRequest {
        token,
        include_quota: true,
        ..ValidateTokenRequest::default()
    });
    let at_least = |revision| MinFreshness {
        at_least: Some(AtLeast::AtLeastRevision(revision)),
    };
    t.texts(
        VALIDATE,
        "min_freshness.at_least_revision",
        REVISIONS,
        |revision| ValidateTokenRequest {
            token: "token".to_owned(),
            min_freshness: Some(at_least(revision)),
            ..ValidateTokenRequest::default()
        },
    );
    t.texts(
        BATCH,
        "min_freshness.at_least_revision",
        REVISIONS,
        |revision| BatchValidateTokensRequest {
            tokens: vec!["token".to_owned()],
            min_freshness: Some(at_least(revision)),
        },
    );
    for (value, tokens) in [
        ("nothing", vec![]),
        ("an empty one", vec!["token".to_owned(), String::new()]),
        ("1001", vec!["token".to_owned(); 1001]),
    ] {
        let message = BatchValidateTokensRequest {
            tokens,
            ..BatchValidateTokensRequest::default()
        };
        t.row(BATCH, "tokens", value, message);
    }
    api_keys(t);
}

fn api_keys(t: &mut Table) {
    let names = &["", "line\nbreak", "nul\u{0}nul", &"é".repeat(101)];
    t.texts(CREATE_KEY, "name", names, |name| CreateApiKeyRequest {
        name,
        ..create_api_key()
    });
    let long = "s".repeat(65);
    for scope in ["", "two words", "quo\"te", "back\\slash", "größe", &long] {
        let scopes = vec!["read".to_owned(), scope.to_owned()];
        let message = CreateApiKeyRequest {
            scopes,
            ..create_api_key()
        };
        t.row(CREATE_KEY, "scopes", scope, message);
    }
    let many = CreateApiKeyRequest {
        scopes: (0..33).map(|n| format!("scope-{n}")).collect(),
        ..create_api_key()
    };
    t.row(CREATE_KEY, "scopes", "scope-32", many);
    let at = |seconds, nanos| Timestamp { seconds, nanos };
    for (value, expires_at) in [
        ("the epoch", at(0, 0)),
        ("a moment ago", ago(1)),
        ("in a year and a day", ago(-366 * DAY)),
        ("past the year 9999", at(i64::MAX, 0)),
        ("negative nanos", at(ago(-DAY).seconds, -1)),
    ] {
        let message = CreateApiKeyRequest {
            expires_at: Some(expires_at),
            ..create_api_key()
        };
        t.row(CREATE_KEY, "expires_at", value, message);
    }
    let list = ListApiKeysRequest::default();
    t.sizes(KEYS, |page_size| ListApiKeysRequest {
        page_size,
        ..list.clone()
    });
    t.texts(KEYS, "page_token", PAGE_TOKENS, |page_token| {
        ListApiKeysRequest {
            page_token,
            ..list.clone()
        }
    });
    t.texts(REVOKE_KEY, "api_key_id", IDS, |api_key_id| {
        RevokeApiKeyRequest { api_key_id }
    });
}

fn usage(t: &mut Table, user: &TestUser) {
    t.row(RECORD, "event", "", RecordUsageRequest { event: None });
    let event = || event(user);
    let record = |event| RecordUsageRequest { event: Some(event) };
    t.texts(RECORD, "event.event_id", IDS, |event_id| {
        record(UsageEvent {
            event_id,
            ..event()
        })
    });
    t.texts(RECORD, "event.user_id", IDS, |user_id| {
        record(UsageEvent { user_id, ..event() })
    });
    let long = "x".repeat(129);
    let models = &["", "a model", "mödel", "model\u{0}", &long];
    t.texts(RECORD, "event.model", models, |model| {
        record(UsageEvent { model, ..event() })
    });
    let ids = &["an id", "nul\u{0}nul", "größe", &long];
    t.texts(RECORD, "event.request_id", ids, |request_id| {
        record(UsageEvent {
            request_id,
            ..event()
        })
    });
    for (value, occurred_at) in times() {
        let event = UsageEvent {
            occurred_at,
            ..event()
        };
        t.row(RECORD, "event.occurred_at", value, record(event));
    }
    for (value, tokens) in [("none", None), ("zero", Some(TokenCounts::default()))] {
        t.row(
            RECORD,
            "event.tokens",
            value,
            record(UsageEvent { tokens, ..event() }),
        );
    }
    for (name, set) in DIMENSIONS {
        for count in [-1, i64::MIN, i64::MAX, 1_000_000_000_001] {
            let mut tokens = some_tokens();
            *set(&mut tokens) = count;
            let message = record(UsageEvent {
                tokens: Some(tokens),
                ..event()
            });
            t.row(
                RECORD,
                &format!("event.tokens.{name}"),
                &count.to_string(),
                message,
            );
        }
    }
    for labels in wrong_labels() {
        let value = labels.keys().next().cloned().unwrap_or_default();
        t.row(
            RECORD,
            "event.labels",
            &value,
            record(UsageEvent { labels, ..event() }),
        );
    }

    for (value, count) in [("none", 0), ("too many", 1001)] {
        let events = vec![event(); count];
        let message = BatchRecordUsageRequest {
            events: events.clone(),
        };
        t.row(RECORD_BATCH, "events", value, message);
        let message = StreamUsageRequest { offset: 0, events };
        t.row(RECORD_STREAM, "events", value, message);
    }
    for offset in [-1, i64::MIN, i64::MAX, (1 << 62) + 1] {
        let events = vec![event()];
        let message = StreamUsageRequest { offset, events };
        t.row(RECORD_STREAM, "offset", &offset.to_string(), message);
    }

    t.texts(CHECK, "user_id", IDS, |user_id| CheckQuotaRequest {
        user_id,
        tokens: 1,
        ..CheckQuotaRequest::default()
    });
    for tokens in [-1, i64::MIN, i64::MAX, 1_000_000_000_001] {
        let user_id = user.id.clone();
        t.row(
            CHECK,
            "tokens",
            &tokens.to_string(),
            CheckQuotaRequest {
                user_id,
                tokens,
                ..CheckQuotaRequest::default()
            },
        );
    }

    t.texts(CHECK, "model", MODELS, |model| CheckQuotaRequest {
        user_id: user.id.clone(),
        tokens: 1,
        model,
    });
    t.texts(QUOTA, "user_id", IDS, |user_id| GetQuotaRequest { user_id });

    let month = |user_id: &str, month: &str| GetMonthlyUsageRequest {
        user_id: user_id.to_owned(),
        month: month.to_owned(),
    };
    // Empty: a service has to say whose.
    t.texts(MONTH, "user_id", IDS, |id| month(&id, "2026-01"));
    t.texts(MONTH, "month", MONTHS, |text| month(&user.id, &text));

    let list = ListUsageRecordsRequest {
        user_id: user.id.clone(),
        ..Default::default()
    };
    t.texts(RECORDS, "user_id", IDS, |user_id| ListUsageRecordsRequest {
        user_id,
        ..list.clone()
    });
    t.texts(RECORDS, "month", MONTHS, |month| ListUsageRecordsRequest {
        month,
        ..list.clone()
    });
    t.sizes(RECORDS, |page_size| ListUsageRecordsRequest {
        page_size,
        ..list.clone()
    });
    t.texts(RECORDS, "page_token", PAGE_TOKENS, |page_token| {
        ListUsageRecordsRequest {
            page_token,
            ..list.clone()
        }
    });
    reads(t, user);
}

fn reservations(t: &mut Table, user: &TestUser) {
    t.texts(RESERVE, "user_id", IDS, |user_id| ReserveQuotaRequest {
        user_id,
        ..reserve(user)
    });
    let long = "x".repeat(129);
    let names = &["", "a name", "größe", "nul\u{0}nul", &long];
    t.texts(RESERVE, "request_id", names, |request_id| {
        ReserveQuotaRequest {
            request_id,
            ..reserve(user)
        }
    });
    t.texts(RESERVE, "model", names, |model| ReserveQuotaRequest {
        model,
        ..reserve(user)
    });
    for tokens in [0, -1, i64::MIN, i64::MAX, 1_000_000_000_001] {
        let message = ReserveQuotaRequest {
            tokens,
            ..reserve(user)
        };
        t.row(RESERVE, "tokens", &tokens.to_string(), message);
    }
    for mode in [-1, 4, i32::MAX] {
        let message = ReserveQuotaRequest {
            mode,
            ..reserve(user)
        };
        t.row(RESERVE, "mode", &mode.to_string(), message);
    }
    let lifetime = |seconds, nanos| prost_types::Duration { seconds, nanos };
    for (value, lifetime) in [
        ("zero", lifetime(0, 0)),
        ("below a second", lifetime(0, 999_999_999)),
        ("above an hour", lifetime(3600, 1)),
        ("negative", lifetime(-5, 0)),
        ("longest", lifetime(i64::MAX, 999_999_999)),
    ] {
        let message = ReserveQuotaRequest {
            lifetime: Some(lifetime),
            ..reserve(user)
        };
        t.row(RESERVE, "lifetime", value, message);
        let message = ExtendReservationRequest {
            reservation: "any".to_owned(),
            lifetime: Some(lifetime),
        };
        t.row(EXTEND, "lifetime", value, message);
    }
    let commit = |tokens| CommitReservationRequest {
        reservation: "any".to_owned(),
        tokens,
        ..CommitReservationRequest::default()
    };
    for (value, tokens) in [("none", None), ("zero", Some(TokenCounts::default()))] {
        t.row(COMMIT, "tokens", value, commit(tokens));
    }
    for (name, set) in DIMENSIONS {
        for count in [-1, i64::MIN, i64::MAX, 1_000_000_000_001] {
            let mut tokens = some_tokens();
            *set(&mut tokens) = count;
            let field = format!("tokens.{name}");
            t.row(COMMIT, &field, &count.to_string(), commit(Some(tokens)));
        }
    }
    for labels in wrong_labels() {
        let value = labels.keys().next().cloned().unwrap_or_default();
        let message = CommitReservationRequest {
            labels,
            ..commit(Some(some_tokens()))
        };
        t.row(COMMIT, "labels", &value, message);
    }
}

/// The filters of the reads, and what is asked of usage over time.
fn reads(t: &mut Table, user: &TestUser) {
    let user_id = user.id.clone();
    let list = ListUsageRecordsRequest {
        user_id: user_id.clone(),
        ..Default::default()
    };
    let export = ExportUsageRequest {
        user_id: user_id.clone(),
        ..Default::default()
    };
    let query = QueryUsageRequest {
        user_id,
        ..Default::default()
    };
    t.texts(EXPORT, "user_id", IDS, |user_id| ExportUsageRequest {
        user_id,
        ..export.clone()
    });
    t.texts(QUERY, "user_id", IDS, |user_id| QueryUsageRequest {
        user_id,
        ..query.clone()
    });
    t.texts(EXPORT, "month", MONTHS, |month| ExportUsageRequest {
        month,
        ..export.clone()
    });
    for model in ["a model", "mödel", "model\u{0}", &"x".repeat(129)] {
        let text = || model.to_owned();
        let message = ListUsageRecordsRequest {
            model: text(),
            ..list.clone()
        };
        t.row(RECORDS, "model", model, message);
        let message = ExportUsageRequest {
            model: text(),
            ..export.clone()
        };
        t.row(EXPORT, "model", model, message);
        let message = QueryUsageRequest {
            model: text(),
            ..query.clone()
        };
        t.row(QUERY, "model", model, message);
    }
    let ranges = wrong_ranges().into_iter();
    for (field, value, start_time, end_time) in ranges {
        let message = ListUsageRecordsRequest {
            start_time,
            end_time,
            ..list.clone()
        };
        t.row(RECORDS, field, value, message);
        let message = ExportUsageRequest {
            start_time,
            end_time,
            ..export.clone()
        };
        t.row(EXPORT, field, value, message);
        let message = QueryUsageRequest {
            start_time,
            end_time,
            ..query.clone()
        };
        t.row(QUERY, field, value, message);
    }
    let both = ExportUsageRequest {
        all_users: true,
        ..export.clone()
    };
    t.row(EXPORT, "all_users", "with a user", both);
    for number in [-1, 4, i32::MAX] {
        let value = number.to_string();
        let message = QueryUsageRequest {
            interval: number,
            ..query.clone()
        };
        t.row(QUERY, "interval", &value, message);
        let message = QueryUsageRequest {
            group_by: number,
            ..query.clone()
        };
        t.row(QUERY, "group_by", &value, message);
        let format = if number == 4 { 3 } else { number };
        let message = ExportUsageRequest {
            format,
            ..export.clone()
        };
        t.row(EXPORT, "format", &format.to_string(), message);
    }
    for max_groups in [-1, i32::MIN, 101, i32::MAX] {
        let message = QueryUsageRequest {
            max_groups,
            ..query.clone()
        };
        t.row(QUERY, "max_groups", &max_groups.to_string(), message);
    }
    let by_label = QueryUsageRequest {
        group_by: GroupBy::Label.into(),
        ..query.clone()
    };
    for key in ["", "nul\u{0}nul", &"k".repeat(65)] {
        let message = QueryUsageRequest {
            label: key.to_owned(),
            ..by_label.clone()
        };
        t.row(QUERY, "label", key, message);
    }
    for group_by in [GroupBy::Unspecified, GroupBy::Model, GroupBy::Dimension] {
        let message = QueryUsageRequest {
            group_by: group_by.into(),
            label: "team".to_owned(),
            ..query.clone()
        };
        t.row(QUERY, "label", "team", message);
    }
    for (interval, days) in [
        (Interval::Hour, 42),
        (Interval::Day, 367),
        // By months, but not by whole ones.
        (Interval::Month, 367),
        (Interval::Month, 1001 * 31),
    ] {
        let message = QueryUsageRequest {
            interval: interval.into(),
            start_time: Some(ago(days * DAY)),
            end_time: Some(ago(0)),
            ..query.clone()
        };
        t.row(QUERY, "start_time", "too long ago", message);
    }
}

type Range = (
    &'static str,
    &'static str,
    Option<Timestamp>,
    Option<Timestamp>,
);

/// Ranges of time with one wrong bound.
fn wrong_ranges() -> Vec<Range> {
    let at = |seconds, nanos| Some(Timestamp { seconds, nanos });
    let now = ago(0).seconds;
    let mut ranges = vec![
        ("start_time", "the end", at(now, 0), at(now, 0)),
        ("start_time", "after the end", at(now, 1000), at(now, 0)),
    ];
    for (value, wrong) in [
        ("before the epoch", at(-1, 0)),
        ("past the year 9999", at(i64::MAX, 0)),
        ("negative nanos", at(now, -1)),
        ("nanos of a second", at(now, 1_000_000_000)),
    ] {
        ranges.push(("start_time", value, wrong, None));
        ranges.push(("end_time", value, None, wrong));
    }
    ranges
}

fn admin(t: &mut Table, user: &TestUser) {
    t.texts(CREATE_USER, "email", EMAILS, |email| CreateUserRequest {
        email,
        ..create_user()
    });
    t.texts(CREATE_USER, "username", USERNAMES, |username| {
        CreateUserRequest {
            username,
            ..create_user()
        }
    });
    t.texts(CREATE_USER, "full_name", FULL_NAMES, |full_name| {
        CreateUserRequest {
            full_name,
            ..create_user()
        }
    });
    t.texts(CREATE_USER, "password", PASSWORDS, |text| {
        CreateUserRequest {
            credential: Some(Credential::Password(text)),
            ..create_user()
        }
    });
    let hashes = &[
        "",
        "5f4dcc3b5aa765d61d8327deb882cf99",
        "$2b$10$tooshort",
        "$2b$31$abcdefghijklmnopqrstuuMcnPdeRkvEBlHOWJbkQDpMTFsRJ7pQW",
        "$argon2id$v=19$m=999999999,t=2,p=1$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaaJObG",
        "$1$salt$qJH7.N4xYta3aEG/dfqo/0",
    ];
    t.texts(CREATE_USER, "password_hash", hashes, |text| {
        CreateUserRequest {
            credential: Some(Credential::PasswordHash(text)),
            ..create_user()
        }
    });
    t.texts(CREATE_USER, "tier", TIERS, |tier| CreateUserRequest {
        tier,
        ..create_user()
    });
    t.texts(CREATE_USER, "tier", &["platinum"], |tier| {
        CreateUserRequest {
            tier,
            ..create_user()
        }
    });
    for role in [-1, 3, i32::MAX] {
        let message = CreateUserRequest {
            role,
            ..create_user()
        };
        t.row(CREATE_USER, "role", &role.to_string(), message);
    }

    t.texts(GET_USER, "user_id", IDS, |user_id| GetUserRequest {
        user_id,
    });
    t.texts(ENABLE, "user_id", IDS, |user_id| EnableUserRequest {
        user_id,
    });
    t.texts(DISABLE, "user_id", IDS, |user_id| DisableUserRequest {
        user_id,
        reason: String::new(),
    });
    let reasons = &["reason\u{0}reason", &"é".repeat(501)];
    t.texts(DISABLE, "reason", reasons, |reason| DisableUserRequest {
        user_id: user.id.clone(),
        reason,
    });
    let tier = |user_id: &str, tier: &str| SetUserTierRequest {
        user_id: user_id.to_owned(),
        tier: tier.to_owned(),
    };
    t.texts(SET_TIER, "user_id", IDS, |id| tier(&id, "free"));
    t.texts(SET_TIER, "tier", &["", "platinum", "Free"], |text| {
        tier(&user.id, &text)
    });

    t.row(LOOKUP, "by", "", LookupUserRequest { by: None });
    t.texts(LOOKUP, "email", EMAILS, |text| LookupUserRequest {
        by: Some(By::Email(text)),
    });
    t.texts(LOOKUP, "username", USERNAMES, |text| LookupUserRequest {
        by: Some(By::Username(text)),
    });

    let list = ListUsersRequest::default();
    t.sizes(USERS, |page_size| ListUsersRequest {
        page_size,
        ..list.clone()
    });
    t.texts(USERS, "page_token", PAGE_TOKENS, |page_token| {
        ListUsersRequest {
            page_token,
            ..list.clone()
        }
    });
    t.texts(USERS, "tier", TIERS, |tier| ListUsersRequest {
        tier,
        ..list.clone()
    });

    let service = |name: &str, scopes: &[&str]| CreateServiceAccountRequest {
        name: name.to_owned(),
        scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
    };
    t.texts(CREATE_SERVICE, "name", USERNAMES, |name| {
        service(&name, &["quota"])
    });
    for scopes in [
        &[][..],
        &[""],
        &["everything"],
        &["quota", "Quota"],
        &["quota "],
    ] {
        let value = scopes.last().copied().unwrap_or_default();
        // `quota` itself is among the names that the answer lists.
        let value = if value.trim() == "quota" { "" } else { value };
        t.row(
            CREATE_SERVICE,
            "scopes",
            value,
            service("a-service", scopes),
        );
    }
    t.sizes(SERVICES, |page_size| ListServiceAccountsRequest {
        page_size,
        page_token: String::new(),
    });
    t.texts(SERVICES, "page_token", PAGE_TOKENS, |page_token| {
        ListServiceAccountsRequest {
            page_size: 0,
            page_token,
        }
    });
    t.texts(ROTATE, "service_account_id", IDS, |service_account_id| {
        RotateServiceKeyRequest {
            service_account_id,
            overlap: None,
        }
    });
    for (value, seconds, nanos) in [
        ("below zero", -1, 0),
        ("negative nanos", 1, -1),
        ("nanos of a second", 1, 1_000_000_000),
        ("over 30 days", 30 * DAY, 1),
        ("for ever", i64::MAX, 0),
    ] {
        let message = RotateServiceKeyRequest {
            service_account_id: user.id.clone(),
            overlap: Some(prost_types::Duration { seconds, nanos }),
        };
        t.row(ROTATE, "overlap", value, message);
    }
    t.texts(
        DISABLE_SERVICE,
        "service_account_id",
        IDS,
        |service_account_id| DisableServiceAccountRequest { service_account_id },
    );
}

fn limits(t: &mut Table, user: &TestUser) {
    let over = || set_override(user);
    let late = [
        ("the epoch", Timestamp::default()),
        ("a moment ago", ago(1)),
        ("eleven years ahead", ago(-11 * 366 * DAY)),
        (
            "past the year 9999",
            Timestamp {
                seconds: i64::MAX,
                nanos: 0,
            },
        ),
        (
            "negative nanos",
            Timestamp {
                seconds: ago(-DAY).seconds,
                nanos: -1,
            },
        ),
    ];
    let reasons = &["reason\u{0}reason", &"é".repeat(501)];
    t.texts(OVERRIDE, "user_id", IDS, |user_id| {
        SetQuotaOverrideRequest { user_id, ..over() }
    });
    let none = SetQuotaOverrideRequest {
        limit: None,
        ..over()
    };
    t.row(OVERRIDE, "limit", "", none);
    for tokens in [-1, i64::MIN, 1_000_000_000_000_001, i64::MAX] {
        let message = SetQuotaOverrideRequest {
            limit: Some(Limit::MonthlyTokens(tokens)),
            ..over()
        };
        t.row(OVERRIDE, "monthly_tokens", &tokens.to_string(), message);
    }
    for (value, at) in late {
        let message = SetQuotaOverrideRequest {
            expires_at: Some(at),
            ..over()
        };
        t.row(OVERRIDE, "expires_at", value, message);
    }
    t.texts(OVERRIDE, "reason", reasons, |reason| {
        SetQuotaOverrideRequest { reason, ..over() }
    });
    t.texts(CLEAR, "user_id", IDS, |user_id| ClearQuotaOverrideRequest {
        user_id,
        reason: String::new(),
    });
    t.texts(CLEAR, "reason", reasons, |reason| {
        ClearQuotaOverrideRequest {
            user_id: user.id.clone(),
            reason,
        }
    });

    let grant = || grant_credits(user);
    t.texts(GRANT, "user_id", IDS, |user_id| GrantCreditsRequest {
        user_id,
        ..grant()
    });
    t.texts(GRANT, "request_id", IDS, |request_id| GrantCreditsRequest {
        request_id,
        ..grant()
    });
    for tokens in [0, -1, i64::MIN, 1_000_000_000_000_001, i64::MAX] {
        let message = GrantCreditsRequest { tokens, ..grant() };
        t.row(GRANT, "tokens", &tokens.to_string(), message);
    }
    for priority in [-1, 1001, i32::MIN, i32::MAX] {
        let message = GrantCreditsRequest {
            priority,
            ..grant()
        };
        t.row(GRANT, "priority", &format!("priority {priority}"), message);
    }
    for (value, at) in late {
        let message = GrantCreditsRequest {
            expires_at: Some(at),
            ..grant()
        };
        t.row(GRANT, "expires_at", value, message);
    }
    t.texts(GRANT, "reason", reasons, |reason| GrantCreditsRequest {
        reason,
        ..grant()
    });
    let list = ListCreditsRequest {
        user_id: user.id.clone(),
        ..Default::default()
    };
    t.texts(CREDITS, "user_id", IDS, |user_id| ListCreditsRequest {
        user_id,
        ..list.clone()
    });
    t.sizes(CREDITS, |page_size| ListCreditsRequest {
        page_size,
        ..list.clone()
    });
    t.texts(CREDITS, "page_token", PAGE_TOKENS, |page_token| {
        ListCreditsRequest {
            page_token,
            ..list.clone()
        }
    });
    t.texts(VOID, "credit_id", IDS, |credit_id| VoidCreditsRequest {
        credit_id,
        reason: String::new(),
    });
    t.texts(VOID, "reason", reasons, |reason| VoidCreditsRequest {
        credit_id: user.id.clone(),
        reason,
    });
}

/// Requests with several wrong fields, and these fields.
pub(super) fn all_at_once(user: &TestUser) -> Vec<(&'static str, &'static [&'static str], Bytes)> {
    let bad = || "?".to_owned();
    let people = &["email", "username", "full_name", "password"];
    let register = RegisterRequest {
        email: bad(),
        username: bad(),
        full_name: "\n".to_owned(),
        password: bad(),
    };
    let create = CreateUserRequest {
        email: bad(),
        username: bad(),
        full_name: "\n".to_owned(),
        credential: Some(Credential::Password(bad())),
        tier: bad(),
        role: 9,
    };
    let old = Timestamp {
        seconds: 1,
        nanos: 0,
    };
    let never = Some(Timestamp {
        seconds: -1,
        nanos: 0,
    });
    let counts = TokenCounts {
        input: -1,
        output: -1,
        cached_input: -1,
        cache_write: -1,
        reasoning: -1,
    };
    let event = UsageEvent {
        event_id: bad(),
        occurred_at: Some(old),
        user_id: bad(),
        model: String::new(),
        tokens: Some(counts),
        request_id: " ".to_owned(),
        labels: HashMap::from([(String::new(), String::new())]),
    };
    // Its user and its shape are right, its content is not.
    let late = UsageEvent {
        occurred_at: Some(old),
        model: String::new(),
        ..self::event(user)
    };
    let over = SetQuotaOverrideRequest {
        user_id: bad(),
        limit: None,
        expires_at: Some(old),
        reason: "\0".to_owned(),
    };
    let grant = GrantCreditsRequest {
        user_id: bad(),
        tokens: 0,
        priority: -1,
        expires_at: Some(old),
        reason: "\0".to_owned(),
        request_id: bad(),
    };
    let list = ListUsageRecordsRequest {
        user_id: bad(),
        month: bad(),
        page_size: -1,
        page_token: bad(),
        start_time: never,
        end_time: never,
        model: " ".to_owned(),
    };
    let query = QueryUsageRequest {
        user_id: bad(),
        start_time: never,
        end_time: never,
        interval: 9,
        group_by: 9,
        label: String::new(),
        model: " ".to_owned(),
        max_groups: 0,
    };
    let export = ExportUsageRequest {
        user_id: bad(),
        all_users: true,
        month: bad(),
        start_time: never,
        end_time: never,
        model: " ".to_owned(),
        format: 9,
    };
    let users = ListUsersRequest {
        page_size: -1,
        page_token: bad(),
        tier: "?".to_owned(),
        is_active: None,
        email_prefix: " ".to_owned(),
        username_prefix: "é".to_owned(),
        role: -1,
    };
    let login = LoginRequest {
        identifier: bad(),
        password: String::new(),
    };
    let month = GetMonthlyUsageRequest {
        user_id: bad(),
        month: bad(),
    };
    let tier = SetUserTierRequest {
        user_id: bad(),
        tier: bad(),
    };
    let disable = DisableUserRequest {
        user_id: bad(),
        reason: "x".repeat(501),
    };
    let service = CreateServiceAccountRequest {
        name: bad(),
        scopes: vec![],
    };
    let services = ListServiceAccountsRequest {
        page_size: -1,
        page_token: bad(),
    };
    let stream = StreamUsageRequest {
        offset: -1,
        events: vec![],
    };
    let check = CheckQuotaRequest {
        user_id: bad(),
        tokens: -1,
        ..CheckQuotaRequest::default()
    };
    let reserve = ReserveQuotaRequest {
        user_id: bad(),
        request_id: String::new(),
        model: String::new(),
        tokens: 0,
        mode: 9,
        lifetime: Some(prost_types::Duration::default()),
    };
    let commit = CommitReservationRequest {
        reservation: bad(),
        tokens: Some(TokenCounts {
            input: -1,
            output: -1,
            ..TokenCounts::default()
        }),
        labels: HashMap::from([(String::new(), String::new())]),
    };
    let rotate = RotateServiceKeyRequest {
        service_account_id: bad(),
        overlap: Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        }),
    };
    let key = CreateApiKeyRequest {
        name: String::new(),
        scopes: vec![String::new()],
        expires_at: Some(old),
    };
    let keys = ListApiKeysRequest {
        page_size: -1,
        page_token: bad(),
        show_ended: true,
    };
    vec![
        (CREATE_KEY, &["name", "scopes", "expires_at"], encode(&key)),
        (KEYS, &["page_size", "page_token"], encode(&keys)),
        (ROTATE, &["service_account_id", "overlap"], encode(&rotate)),
        (REGISTER, people, encode(&register)),
        (
            CREATE_USER,
            &["email", "username", "full_name", "password", "tier", "role"],
            encode(&create),
        ),
        (LOGIN, &["identifier", "password"], encode(&login)),
        (
            RECORD,
            &[
                "event.event_id",
                "event.occurred_at",
                "event.user_id",
                "event.model",
                "event.tokens.input",
                "event.tokens.output",
                "event.tokens.cached_input",
                "event.tokens.cache_write",
                "event.tokens.reasoning",
                "event.request_id",
                "event.labels",
            ],
            encode(&RecordUsageRequest { event: Some(event) }),
        ),
        (
            RECORD,
            &["event.occurred_at", "event.model"],
            encode(&RecordUsageRequest { event: Some(late) }),
        ),
        (RECORD_STREAM, &["offset", "events"], encode(&stream)),
        (CHECK, &["user_id", "tokens"], encode(&check)),
        (
            RESERVE,
            &[
                "user_id",
                "request_id",
                "model",
                "tokens",
                "mode",
                "lifetime",
            ],
            encode(&reserve),
        ),
        (
            COMMIT,
            &["tokens.input", "tokens.output", "labels"],
            encode(&commit),
        ),
        (MONTH, &["user_id", "month"], encode(&month)),
        (
            RECORDS,
            &[
                "user_id",
                "month",
                "page_size",
                "page_token",
                "start_time",
                "end_time",
                "model",
            ],
            encode(&list),
        ),
        (
            QUERY,
            &[
                "user_id",
                "start_time",
                "end_time",
                "interval",
                "group_by",
                "model",
            ],
            encode(&query),
        ),
        (
            EXPORT,
            &[
                "user_id",
                "all_users",
                "month",
                "start_time",
                "end_time",
                "model",
                "format",
            ],
            encode(&export),
        ),
        (
            USERS,
            &[
                "page_size",
                "page_token",
                "tier",
                "email_prefix",
                "username_prefix",
                "role",
            ],
            encode(&users),
        ),
        (
            OVERRIDE,
            &["user_id", "limit", "expires_at", "reason"],
            encode(&over),
        ),
        (
            GRANT,
            &[
                "user_id",
                "tokens",
                "priority",
                "expires_at",
                "reason",
                "request_id",
            ],
            encode(&grant),
        ),
        (SET_TIER, &["user_id", "tier"], encode(&tier)),
        (DISABLE, &["user_id", "reason"], encode(&disable)),
        (CREATE_SERVICE, &["name", "scopes"], encode(&service)),
        (SERVICES, &["page_size", "page_token"], encode(&services)),
    ]
}

/// Rows, and how they are made.
#[derive(Default)]
struct Table(Vec<Wrong>);

impl Table {
    fn row(&mut self, rpc: &'static str, field: &str, value: &str, message: impl Message) {
        self.0.push(Wrong {
            rpc,
            field: field.to_owned(),
            value: value.to_owned(),
            message: encode(&message),
        });
    }

    /// One row for each text.
    fn texts<M: Message>(
        &mut self,
        rpc: &'static str,
        field: &str,
        texts: &[&str],
        message: impl Fn(String) -> M,
    ) {
        for text in texts {
            self.row(rpc, field, text, message((*text).to_owned()));
        }
    }

    fn sizes<M: Message>(&mut self, rpc: &'static str, message: impl Fn(i32) -> M) {
        for size in [-1, i32::MIN] {
            self.row(rpc, "page_size", &size.to_string(), message(size));
        }
    }
}

/// A registration that succeeds.
pub(super) fn register() -> RegisterRequest {
    let name = unique_name();
    RegisterRequest {
        email: format!("{name}@example.com"),
        username: name,
        full_name: "A Person".to_owned(),
        password: PASSWORD.to_owned(),
    }
}

/// A limit that a user may be given.
pub(super) fn set_override(user: &TestUser) -> SetQuotaOverrideRequest {
    SetQuotaOverrideRequest {
        user_id: user.id.clone(),
        limit: Some(Limit::MonthlyTokens(1000)),
        expires_at: Some(ago(-DAY)),
        reason: "a reason".to_owned(),
    }
}

/// Credits that a user may be granted.
pub(super) fn grant_credits(user: &TestUser) -> GrantCreditsRequest {
    GrantCreditsRequest {
        user_id: user.id.clone(),
        tokens: 1000,
        priority: 5,
        expires_at: Some(ago(-DAY)),
        reason: "a reason".to_owned(),
        request_id: Uuid::now_v7().to_string(),
    }
}

/// A user whom an administrator may create.
pub(super) fn create_user() -> CreateUserRequest {
    let name = unique_name();
    CreateUserRequest {
        email: format!("{name}@example.com"),
        username: name,
        ..CreateUserRequest::default()
    }
}

/// An API key that a user may make.
pub(super) fn create_api_key() -> CreateApiKeyRequest {
    CreateApiKeyRequest {
        name: "a key".to_owned(),
        scopes: vec!["read".to_owned()],
        expires_at: None,
    }
}

/// An event that is booked.
pub(super) fn event(user: &TestUser) -> UsageEvent {
    UsageEvent {
        event_id: Uuid::now_v7().to_string(),
        occurred_at: Some(ago(0)),
        user_id: user.id.clone(),
        model: "a-model".to_owned(),
        tokens: Some(TokenCounts {
            input: 1,
            ..TokenCounts::default()
        }),
        request_id: String::new(),
        labels: HashMap::new(),
    }
}

/// The time `secs` ago.
pub(super) fn ago(secs: i64) -> Timestamp {
    let seconds = chrono::Utc::now().timestamp() - secs;
    Timestamp { seconds, nanos: 0 }
}

/// Quota that is held.
pub(super) fn reserve(user: &TestUser) -> ReserveQuotaRequest {
    ReserveQuotaRequest {
        user_id: user.id.clone(),
        request_id: Uuid::now_v7().to_string(),
        model: "a-model".to_owned(),
        tokens: 1,
        ..ReserveQuotaRequest::default()
    }
}

fn some_tokens() -> TokenCounts {
    TokenCounts {
        input: 1,
        output: 1,
        ..TokenCounts::default()
    }
}

type Set = fn(&mut TokenCounts) -> &mut i64;

/// The dimensions of tokens.
pub(super) const DIMENSIONS: [(&str, Set); 5] = [
    ("input", |counts| &mut counts.input),
    ("output", |counts| &mut counts.output),
    ("cached_input", |counts| &mut counts.cached_input),
    ("cache_write", |counts| &mut counts.cache_write),
    ("reasoning", |counts| &mut counts.reasoning),
];

fn times() -> [(&'static str, Option<Timestamp>); 8] {
    let at = |seconds, nanos| Some(Timestamp { seconds, nanos });
    let now = ago(0).seconds;
    [
        ("unset", None),
        ("the epoch", at(0, 0)),
        ("before the epoch", at(-1, 0)),
        ("past the year 9999", at(i64::MAX, 0)),
        ("negative nanos", at(now, -1)),
        ("nanos of a second", at(now, 1_000_000_000)),
        ("36 days ago", Some(ago(36 * DAY))),
        ("6 minutes ahead", Some(ago(-6 * 60))),
    ]
}

pub(super) const DAY: i64 = 24 * 60 * 60;

fn wrong_labels() -> [HashMap<String, String>; 6] {
    let one = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
    [
        one("", "no key"),
        one(&"k".repeat(65), ""),
        one("long value", &"v".repeat(257)),
        one("nul\0key", ""),
        one("nul value", "\0"),
        (0..17)
            .map(|n| (format!("label {n}"), String::new()))
            .collect(),
    ]
}

/// A name that nobody has: its end is random.
fn unique_name() -> String {
    let id = Uuid::now_v7().simple().to_string();
    format!("u{}", &id[2..])
}

fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

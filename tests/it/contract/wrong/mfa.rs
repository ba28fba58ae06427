//! Wrong values of what is done with second factors.

use tollkeeper::proto::tollkeeper::{
    admin::v1::ResetUserMfaRequest,
    auth::v1::{
        CompleteMfaRequest, ConfirmTotpRequest, DisableTotpRequest, EnrollTotpRequest,
        RegenerateRecoveryCodesRequest,
    },
};

use super::{IDS, Table};
use crate::harness::{PASSWORD, TestUser};

const COMPLETE: &str = "auth.v1.AuthService/CompleteMfa";
const ENROLL: &str = "auth.v1.AuthService/EnrollTotp";
const CONFIRM: &str = "auth.v1.AuthService/ConfirmTotp";
const DISABLE: &str = "auth.v1.AuthService/DisableTotp";
const REGENERATE: &str = "auth.v1.AuthService/RegenerateRecoveryCodes";
const RESET: &str = "admin.v1.AdminService/ResetUserMfa";

/// Neither six digits nor a recovery code.
const CODES: &[&str] = &[
    "",
    "12345",
    "1234567",
    "12345x",
    "١٢٣٤٥٦",
    "nul\u{0}nul",
    // Too short, too long, and with a letter that none has.
    "0123-4567-89AB-CDEF-GHJK-MNP",
    "0123-4567-89AB-CDEF-GHJK-MNPQ-R",
    "0123-4567-89AB-CDEF-GHJK-MNPU",
];

pub(super) fn mfa(t: &mut Table, user: &TestUser) {
    let (challenge, code) = ("tkm_something".to_owned(), "123456".to_owned());
    let complete = CompleteMfaRequest { challenge, code };
    let long = "x".repeat(1025);
    t.texts(COMPLETE, "challenge", &["", &long], |challenge| {
        CompleteMfaRequest {
            challenge,
            ..complete.clone()
        }
    });
    t.texts(COMPLETE, "code", CODES, |code| CompleteMfaRequest {
        code,
        ..complete.clone()
    });

    let passwords = &["", &*long];
    t.texts(ENROLL, "current_password", passwords, |text| {
        EnrollTotpRequest {
            current_password: text,
        }
    });
    let confirm = |code| ConfirmTotpRequest {
        code,
        keep_other_sessions: true,
    };
    t.texts(CONFIRM, "code", CODES, confirm);
    // The app is to be shown, not what stands in for it.
    t.texts(CONFIRM, "code", &["0123-4567-89AB-CDEF-GHJK-MNPQ"], confirm);

    let disable = DisableTotpRequest {
        current_password: PASSWORD.to_owned(),
        code: "123456".to_owned(),
        keep_other_sessions: true,
    };
    t.texts(DISABLE, "current_password", passwords, |text| {
        DisableTotpRequest {
            current_password: text,
            ..disable.clone()
        }
    });
    t.texts(DISABLE, "code", CODES, |code| DisableTotpRequest {
        code,
        ..disable.clone()
    });

    let regenerate = RegenerateRecoveryCodesRequest {
        current_password: PASSWORD.to_owned(),
        code: "123456".to_owned(),
    };
    t.texts(REGENERATE, "current_password", passwords, |text| {
        RegenerateRecoveryCodesRequest {
            current_password: text,
            ..regenerate.clone()
        }
    });
    t.texts(REGENERATE, "code", CODES, |code| {
        RegenerateRecoveryCodesRequest {
            code,
            ..regenerate.clone()
        }
    });

    let reset = ResetUserMfaRequest {
        user_id: user.id.clone(),
        reason: String::new(),
    };
    t.texts(RESET, "user_id", IDS, |user_id| ResetUserMfaRequest {
        user_id,
        ..reset.clone()
    });
    let long = "x".repeat(501);
    t.texts(RESET, "reason", &["nul\u{0}nul", &long], |reason| {
        ResetUserMfaRequest {
            reason,
            ..reset.clone()
        }
    });
}

//! Wrong values of what people and administrators do to accounts and sessions.

use prost_types::FieldMask;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{ListUserSessionsRequest, RevokeUserSessionsRequest},
    auth::v1::{
        ChangePasswordRequest, ListSessionsRequest, RevokeSessionRequest, UpdateCurrentUserRequest,
        User,
    },
};

use super::{FULL_NAMES, IDS, PAGE_TOKENS, PASSWORDS, Table, USERNAMES};
use crate::harness::{PASSWORD, TestUser};

const UPDATE_ME: &str = "auth.v1.AuthService/UpdateCurrentUser";
const CHANGE_PASSWORD: &str = "auth.v1.AuthService/ChangePassword";

const SESSIONS: &str = "auth.v1.AuthService/ListSessions";
const REVOKE_SESSION: &str = "auth.v1.AuthService/RevokeSession";
const USER_SESSIONS: &str = "admin.v1.AdminService/ListUserSessions";
const REVOKE_USER_SESSIONS: &str = "admin.v1.AdminService/RevokeUserSessions";

pub(super) fn sessions(t: &mut Table, user: &TestUser) {
    let list = ListSessionsRequest::default();
    t.sizes(SESSIONS, |page_size| ListSessionsRequest {
        page_size,
        ..list.clone()
    });
    t.texts(SESSIONS, "page_token", PAGE_TOKENS, |page_token| {
        ListSessionsRequest {
            page_token,
            ..list.clone()
        }
    });
    t.texts(REVOKE_SESSION, "session_id", IDS, |session_id| {
        RevokeSessionRequest { session_id }
    });
    let list = ListUserSessionsRequest {
        user_id: user.id.clone(),
        ..ListUserSessionsRequest::default()
    };
    t.texts(USER_SESSIONS, "user_id", IDS, |user_id| {
        ListUserSessionsRequest {
            user_id,
            ..list.clone()
        }
    });
    t.sizes(USER_SESSIONS, |page_size| ListUserSessionsRequest {
        page_size,
        ..list.clone()
    });
    t.texts(USER_SESSIONS, "page_token", PAGE_TOKENS, |page_token| {
        ListUserSessionsRequest {
            page_token,
            ..list.clone()
        }
    });
    let revoke = RevokeUserSessionsRequest {
        user_id: user.id.clone(),
        ..RevokeUserSessionsRequest::default()
    };
    t.texts(REVOKE_USER_SESSIONS, "user_id", IDS, |user_id| {
        RevokeUserSessionsRequest {
            user_id,
            ..revoke.clone()
        }
    });
    // Empty means all.
    t.texts(
        REVOKE_USER_SESSIONS,
        "session_id",
        &IDS[1..],
        |session_id| RevokeUserSessionsRequest {
            session_id,
            ..revoke.clone()
        },
    );
    let long = "x".repeat(501);
    t.texts(
        REVOKE_USER_SESSIONS,
        "reason",
        &["nul\u{0}nul", &long],
        |reason| RevokeUserSessionsRequest {
            reason,
            ..revoke.clone()
        },
    );
}

pub(super) fn own_account(t: &mut Table) {
    let message = UpdateCurrentUserRequest::default();
    t.row(UPDATE_ME, "user", "unset", message);
    let update = |user, path: &str| UpdateCurrentUserRequest {
        user: Some(user),
        update_mask: Some(mask(path)),
    };
    t.texts(UPDATE_ME, "user.username", USERNAMES, |username| {
        let user = User {
            username,
            ..User::default()
        };
        update(user, "username")
    });
    t.texts(UPDATE_ME, "user.full_name", FULL_NAMES, |full_name| {
        let user = User {
            full_name,
            ..User::default()
        };
        update(user, "full_name")
    });
    t.texts(UPDATE_ME, "update_mask", MASKS, |path| {
        update(User::default(), &path)
    });
    t.texts(UPDATE_ME, "update_mask", &["email", "role"], |path| {
        update(User::default(), &path)
    });

    let change = ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: "a staple for the next battery".to_owned(),
        keep_other_sessions: true,
    };
    let long = "x".repeat(1025);
    t.texts(CHANGE_PASSWORD, "current_password", &["", &long], |text| {
        ChangePasswordRequest {
            current_password: text,
            ..change.clone()
        }
    });
    let weak = [PASSWORDS, &["password1234", "aaaaaaaaaaaa", PASSWORD]].concat();
    t.texts(CHANGE_PASSWORD, "new_password", &weak, |new_password| {
        ChangePasswordRequest {
            new_password,
            ..change.clone()
        }
    });
}

/// Paths that nobody may change.
const MASKS: &[&str] = &["", "id", "tier", "full_name.first", "Username", "**"];

fn mask(path: &str) -> FieldMask {
    FieldMask {
        paths: vec![path.to_owned()],
    }
}

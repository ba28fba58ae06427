//! Wrong values of what people and administrators do to accounts and sessions.

use prost_types::{FieldMask, Timestamp};
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        DeleteUserRequest, ListAuditEventsRequest, ListUserSessionsRequest, ListUsersRequest,
        RevokeUserSessionsRequest, UpdateUserRequest,
    },
    auth::v1::{
        ChangePasswordRequest, ListSessionsRequest, RequestPasswordResetRequest,
        ResetPasswordRequest, RevokeSessionRequest, UpdateCurrentUserRequest, User,
        VerifyEmailRequest,
    },
};

use super::{DAY, EMAILS, FULL_NAMES, IDS, PAGE_TOKENS, PASSWORDS, Table, USERNAMES, USERS, ago};
use crate::harness::{PASSWORD, TestUser};

const UPDATE_ME: &str = "auth.v1.AuthService/UpdateCurrentUser";
const UPDATE_USER: &str = "admin.v1.AdminService/UpdateUser";
const DELETE_USER: &str = "admin.v1.AdminService/DeleteUser";
const AUDIT: &str = "admin.v1.AdminService/ListAuditEvents";
const CHANGE_PASSWORD: &str = "auth.v1.AuthService/ChangePassword";
const RESET_REQUEST: &str = "auth.v1.AuthService/RequestPasswordReset";
const RESET: &str = "auth.v1.AuthService/ResetPassword";
const VERIFY_EMAIL: &str = "auth.v1.AuthService/VerifyEmail";

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
        current_password: String::new(),
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
    t.texts(UPDATE_ME, "update_mask", &["tier", "role"], |path| {
        update(User::default(), &path)
    });
    let change = |email: &str, current_password: &str| UpdateCurrentUserRequest {
        current_password: current_password.to_owned(),
        ..update(
            User {
                email: email.to_owned(),
                ..User::default()
            },
            "email",
        )
    };
    t.texts(UPDATE_ME, "user.email", EMAILS, |email| {
        change(&email, PASSWORD)
    });
    let long = "x".repeat(1025);
    t.texts(UPDATE_ME, "current_password", &["", &long], |password| {
        change("another@example.com", &password)
    });

    t.texts(RESET_REQUEST, "email", EMAILS, |email| {
        RequestPasswordResetRequest { email }
    });
    t.texts(VERIFY_EMAIL, "token", &[""], |token| VerifyEmailRequest {
        token,
    });
    let reset = ResetPasswordRequest {
        token: "tko_token".to_owned(),
        new_password: PASSWORD.to_owned(),
    };
    t.texts(RESET, "token", &[""], |token| ResetPasswordRequest {
        token,
        ..reset.clone()
    });
    t.texts(RESET, "new_password", PASSWORDS, |new_password| {
        ResetPasswordRequest {
            new_password,
            ..reset.clone()
        }
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

pub(super) fn accounts(t: &mut Table, user: &TestUser) {
    t.row(UPDATE_USER, "user", "unset", UpdateUserRequest::default());
    let update = |user, path: &str| UpdateUserRequest {
        user: Some(user),
        update_mask: Some(mask(path)),
    };
    let blank = || User {
        id: user.id.clone(),
        ..User::default()
    };
    t.texts(UPDATE_USER, "user.id", IDS, |id| {
        update(User { id, ..blank() }, "full_name")
    });
    t.texts(UPDATE_USER, "user.email", EMAILS, |email| {
        let user = User { email, ..blank() };
        update(user, "email")
    });
    t.texts(UPDATE_USER, "user.username", USERNAMES, |username| {
        let user = User {
            username,
            ..blank()
        };
        update(user, "username")
    });
    t.texts(UPDATE_USER, "user.full_name", FULL_NAMES, |full_name| {
        let user = User {
            full_name,
            ..blank()
        };
        update(user, "full_name")
    });
    for role in [0, 3, -1] {
        let user = User { role, ..blank() };
        t.row(
            UPDATE_USER,
            "user.role",
            &role.to_string(),
            update(user, "role"),
        );
    }
    t.texts(UPDATE_USER, "update_mask", MASKS, |path| {
        update(blank(), &path)
    });

    let delete = DeleteUserRequest {
        user_id: user.id.clone(),
        reason: String::new(),
    };
    t.texts(DELETE_USER, "user_id", IDS, |user_id| DeleteUserRequest {
        user_id,
        ..delete.clone()
    });
    let long = "x".repeat(501);
    t.texts(DELETE_USER, "reason", &["nul\u{0}nul", &long], |reason| {
        DeleteUserRequest {
            reason,
            ..delete.clone()
        }
    });

    let list = ListUsersRequest::default();
    let long = "x".repeat(255);
    let prefixes = ["two words", "größe", "nul\u{0}nul", &long];
    t.texts(USERS, "email_prefix", &prefixes, |email_prefix| {
        ListUsersRequest {
            email_prefix,
            ..list.clone()
        }
    });
    t.texts(USERS, "username_prefix", &prefixes, |username_prefix| {
        ListUsersRequest {
            username_prefix,
            ..list.clone()
        }
    });
    for role in [3, -1] {
        let message = ListUsersRequest {
            role,
            ..list.clone()
        };
        t.row(USERS, "role", &role.to_string(), message);
    }
}

pub(super) fn audit_trail(t: &mut Table) {
    let list = ListAuditEventsRequest::default();
    t.sizes(AUDIT, |page_size| ListAuditEventsRequest {
        page_size,
        ..list.clone()
    });
    t.texts(AUDIT, "page_token", PAGE_TOKENS, |page_token| {
        ListAuditEventsRequest {
            page_token,
            ..list.clone()
        }
    });
    t.texts(AUDIT, "user_id", &IDS[1..], |user_id| {
        ListAuditEventsRequest {
            user_id,
            ..list.clone()
        }
    });
    t.texts(AUDIT, "actor_id", &IDS[1..], |actor_id| {
        ListAuditEventsRequest {
            actor_id,
            ..list.clone()
        }
    });
    t.texts(AUDIT, "target_id", &IDS[1..], |target_id| {
        ListAuditEventsRequest {
            target_id,
            ..list.clone()
        }
    });
    let long = "a".repeat(65);
    let actions = ["User.created", "user created", "user%", "nul\u{0}", &long];
    t.texts(AUDIT, "action", &actions, |action| ListAuditEventsRequest {
        action,
        ..list.clone()
    });
    let never = Timestamp {
        seconds: -1,
        nanos: 0,
    };
    for (value, start, end) in [
        ("before 1970", never, None),
        ("the end", ago(0), Some(ago(0))),
        ("after the end", ago(0), Some(ago(DAY))),
    ] {
        let message = ListAuditEventsRequest {
            start_time: Some(start),
            end_time: end,
            ..list.clone()
        };
        t.row(AUDIT, "start_time", value, message);
    }
    let message = ListAuditEventsRequest {
        end_time: Some(never),
        ..list
    };
    t.row(AUDIT, "end_time", "before 1970", message);
}

/// Paths that nobody may change.
const MASKS: &[&str] = &["", "id", "tier", "full_name.first", "Username", "**"];

fn mask(path: &str) -> FieldMask {
    FieldMask {
        paths: vec![path.to_owned()],
    }
}

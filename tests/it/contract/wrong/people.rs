//! Wrong values of what people and administrators do to accounts and sessions.

use tollkeeper::proto::tollkeeper::{
    admin::v1::{ListUserSessionsRequest, RevokeUserSessionsRequest},
    auth::v1::{ListSessionsRequest, RevokeSessionRequest},
};

use super::{IDS, PAGE_TOKENS, Table};
use crate::harness::TestUser;

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

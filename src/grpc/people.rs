//! Messages about people: their sessions.

use super::convert::time;
use crate::{
    model::{SessionDetails, SessionId},
    proto::tollkeeper::auth::v1,
};

/// A session as shown to a caller whose own session is `current`.
pub(super) fn session(details: SessionDetails, current: Option<SessionId>) -> v1::Session {
    let session = details.session;
    v1::Session {
        id: session.id.to_string(),
        created_at: Some(time(details.created_at)),
        last_used_at: Some(time(details.last_used_at)),
        expires_at: Some(time(session.idle_expires_at)),
        ends_at: Some(time(session.absolute_expires_at)),
        revoked_at: session.revoked_at.map(time),
        user_agent: details.user_agent,
        address: details
            .address
            .map(|address| address.to_string())
            .unwrap_or_default(),
        is_current: current == Some(session.id),
    }
}

/// How many, as messages count.
pub(super) fn count(many: usize) -> i32 {
    i32::try_from(many).unwrap_or(i32::MAX)
}

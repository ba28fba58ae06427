//! Messages about people: their profiles and sessions.

use std::str::FromStr;

use prost_types::FieldMask;
use uuid::Uuid;

use super::convert::{Fields, time};
use crate::{
    model::{PageRequest, Role, SessionDetails, SessionId, UserChanges, UserFilter, Violation},
    proto::tollkeeper::{admin::v1::ListUsersRequest, auth::v1},
};

/// What people may change of their own account.
pub(super) const OWN_FIELDS: &[&str] = &["username", "full_name"];

/// What administrators may change of any account here.
pub(super) const ALL_FIELDS: &[&str] = &["email", "username", "full_name", "role"];

/// Reads which users to list.
pub(super) fn list(
    fields: &mut Fields,
    message: &ListUsersRequest,
) -> Option<(UserFilter, PageRequest<Uuid>)> {
    let tier = fields.parse_optional("tier", &message.tier);
    let email = fields.parse_optional("email_prefix", &message.email_prefix);
    let username = fields.parse_optional("username_prefix", &message.username_prefix);
    let role = match message.role {
        0 => Some(None),
        value => fields.take("role", role(value)).map(Some),
    };
    let list = format!(
        "users {} {:?} {} {} {}",
        message.tier,
        message.is_active,
        message.email_prefix,
        message.username_prefix,
        message.role
    );
    let page = fields.page(message.page_size, &message.page_token, &list);
    let filter = UserFilter {
        tier: tier?,
        is_active: message.is_active,
        email: email?,
        username: username?,
        role: role?,
    };
    Some((filter, page?))
}

/// Reads an update of a user (AIP-134): the fields that the mask names, or without one those that are
/// not empty. Only fields of `may_change` can be named.
pub(super) fn changes(
    fields: &mut Fields,
    user: &v1::User,
    mask: Option<&FieldMask>,
    may_change: &[&str],
) -> Option<UserChanges> {
    let paths = mask.map(|mask| &*mask.paths).unwrap_or_default();
    let named = fields.take("update_mask", check_paths(paths, may_change));
    let wants = |field: &str, is_empty: bool| {
        may_change.contains(&field)
            && match paths {
                [] => !is_empty,
                [all] if all == "*" => true,
                paths => paths.iter().any(|path| path == field),
            }
    };
    let email = read(
        fields,
        wants("email", user.email.is_empty()),
        "email",
        &user.email,
    );
    let wants_username = wants("username", user.username.is_empty());
    let username = read(fields, wants_username, "username", &user.username);
    let wants_full_name = wants("full_name", user.full_name.is_empty());
    let full_name = read(fields, wants_full_name, "full_name", &user.full_name);
    let role = match wants("role", user.role == 0) {
        true => fields.take("user.role", role(user.role)).map(Some),
        false => Some(None),
    };
    named?;
    Some(UserChanges {
        email: email?,
        username: username?,
        full_name: full_name?,
        role: role?,
    })
}

/// Parses a field of the user if it is wanted.
fn read<T: FromStr<Err = Violation>>(
    fields: &mut Fields,
    is_wanted: bool,
    field: &str,
    text: &str,
) -> Option<Option<T>> {
    if is_wanted {
        fields.parse(format_args!("user.{field}"), text).map(Some)
    } else {
        Some(None)
    }
}

fn check_paths(paths: &[String], may_change: &[&str]) -> Result<(), Violation> {
    let all = [String::from("*")];
    if paths == all || paths.iter().all(|path| may_change.contains(&&**path)) {
        return Ok(());
    }
    let may_change = may_change.join(", ");
    Err(format!("must name only {may_change}, or hold only *").into())
}

/// Reads a role that must be specified.
pub(super) fn role(value: i32) -> Result<Role, Violation> {
    match v1::Role::try_from(value) {
        Ok(v1::Role::User) => Ok(Role::User),
        Ok(v1::Role::Admin) => Ok(Role::Admin),
        Ok(v1::Role::Unspecified) | Err(_) => Err("must be a known role".into()),
    }
}

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
        mfa: session.mfa,
    }
}

/// How many, as messages count.
pub(super) fn count(many: usize) -> i32 {
    i32::try_from(many).unwrap_or(i32::MAX)
}

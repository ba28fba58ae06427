//! The trail of security-relevant acts, written in the transaction that does them.

use diesel::prelude::*;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use serde_json::Value;
use uuid::Uuid;

use super::schema::audit_events;
use crate::{error::Result, model::AuditEvent};

#[derive(Insertable)]
#[diesel(table_name = audit_events, treat_none_as_default_value = false)]
struct NewAuditEvent<'a> {
    id: Uuid,
    action: &'static str,
    actor_kind: &'static str,
    actor_id: Option<Uuid>,
    target_id: Uuid,
    request_id: &'a str,
    address: Option<String>,
    user_agent: &'a str,
    details: &'a Value,
}

pub(super) async fn audit_insert_in_txn(
    event: &AuditEvent<'_>,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let row = NewAuditEvent {
        id: Uuid::now_v7(),
        action: event.action.as_str(),
        actor_kind: event.origin.actor.kind(),
        actor_id: event.origin.actor.id(),
        target_id: event.target,
        request_id: &event.origin.request_id,
        address: event.origin.address.map(|address| address.to_string()),
        user_agent: &event.origin.user_agent,
        details: &event.details,
    };
    diesel::insert_into(audit_events::table)
        .values(row)
        .execute(conn)
        .await?;
    Ok(())
}

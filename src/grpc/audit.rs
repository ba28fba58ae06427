//! Messages of the audit trail.

use prost_types::{ListValue, Struct, Value, value::Kind};
use uuid::Uuid;

use super::{
    convert::{Fields, time},
    reading::ordered_bounds,
};
use crate::{
    model::{ActionFilter, ActorKind, AuditCursor, AuditFilter, AuditRecord, PageRequest, UserId},
    proto::tollkeeper::admin::v1::{self, ListAuditEventsRequest},
};

/// Reads which acts to list.
pub(super) fn list(
    fields: &mut Fields,
    message: &ListAuditEventsRequest,
) -> Option<(AuditFilter, PageRequest<AuditCursor>)> {
    // All ids are alike; only that of a user has a type of its own here.
    let mut id = |field, text: &str| -> Option<Option<Uuid>> {
        let id: Option<UserId> = fields.parse_optional(field, text)?;
        Some(id.map(|id| id.0))
    };
    let user_id = id("user_id", &message.user_id);
    let actor_id = id("actor_id", &message.actor_id);
    let target_id = id("target_id", &message.target_id);
    let action = fields.parse_optional::<ActionFilter>("action", &message.action);
    let bounds = ordered_bounds(fields, message.start_time, message.end_time);
    let list = format!("audit events {user_id:?} {actor_id:?} {target_id:?} {action:?} {bounds:?}");
    let page = fields.page(message.page_size, &message.page_token, &list);
    let (start, end) = bounds?;
    let filter = AuditFilter {
        user_id: user_id?.map(UserId),
        actor_id: actor_id?,
        target_id: target_id?,
        action: action?,
        start,
        end,
    };
    Some((filter, page?))
}

impl From<AuditRecord> for v1::AuditEvent {
    fn from(record: AuditRecord) -> Self {
        let text = |id: Option<Uuid>| id.map(|id| id.to_string()).unwrap_or_default();
        Self {
            id: record.id.to_string(),
            occurred_at: Some(time(record.occurred_at)),
            action: record.action,
            actor_kind: v1::ActorKind::from(record.actor_kind).into(),
            actor_id: text(record.actor_id),
            target_id: record.target_id.to_string(),
            user_id: text(record.user_id.map(|id| id.0)),
            request_id: record.request_id,
            address: record
                .address
                .map(|address| address.to_string())
                .unwrap_or_default(),
            user_agent: record.user_agent,
            details: match record.details {
                serde_json::Value::Object(details) => Some(object(details)),
                _ => None,
            },
        }
    }
}

impl From<ActorKind> for v1::ActorKind {
    fn from(kind: ActorKind) -> Self {
        match kind {
            ActorKind::Anonymous => Self::Anonymous,
            ActorKind::User => Self::User,
            ActorKind::Service => Self::Service,
            ActorKind::Operator => Self::Operator,
        }
    }
}

fn object(map: serde_json::Map<String, serde_json::Value>) -> Struct {
    Struct {
        fields: map
            .into_iter()
            .map(|(name, json)| (name, value(json)))
            .collect(),
    }
}

fn value(json: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(flag) => Kind::BoolValue(flag),
        // What a double cannot hold is not lost.
        Json::Number(number) => match number.as_f64() {
            Some(double) if number.as_i64().is_none_or(|n| n.unsigned_abs() <= 1 << 53) => {
                Kind::NumberValue(double)
            }
            _ => Kind::StringValue(number.to_string()),
        },
        Json::String(text) => Kind::StringValue(text),
        Json::Array(values) => Kind::ListValue(ListValue {
            values: values.into_iter().map(value).collect(),
        }),
        Json::Object(map) => Kind::StructValue(object(map)),
    };
    Value { kind: Some(kind) }
}

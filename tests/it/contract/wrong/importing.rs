//! Wrong batches and wrong rows of an import.

use prost::Message as _;
use prost_types::Timestamp;
use tollkeeper::proto::tollkeeper::admin::v1::{
    CreateUserRequest, ImportUsersRequest, ImportUsersRow, create_user_request::Credential,
};

use super::{CREATE_USER, DAY, IDS, Table, Wrong, ago, unique_name};

pub(in super::super) const IMPORT: &str = "admin.v1.AdminService/ImportUsers";

/// A row with one wrong field: its name, the value, the row.
pub(in super::super) type WrongRow = (String, String, ImportUsersRow);

/// A time of a row.
type TimeOf = fn(&mut ImportUsersRow) -> &mut Option<Timestamp>;

/// A row that is imported.
fn row() -> ImportUsersRow {
    let name = unique_name();
    ImportUsersRow {
        email: format!("{name}@example.com"),
        username: name,
        ..ImportUsersRow::default()
    }
}

pub(super) fn batches(t: &mut Table) {
    let batch = |rows| ImportUsersRequest {
        source: "legacy".to_owned(),
        rows,
        ..ImportUsersRequest::default()
    };
    let long = "s".repeat(65);
    t.texts(
        IMPORT,
        "source",
        &["", "a system", "nul\u{0}", &long],
        |source| ImportUsersRequest {
            source,
            ..batch(vec![row()])
        },
    );
    t.row(IMPORT, "rows", "none", batch(vec![]));
    t.row(IMPORT, "rows", "501", batch(vec![row(); 501]));
}

/// Rows with what is wrong in `CreateUser` too, and with what only rows have.
pub(in super::super) fn rows(create_user: &[Wrong]) -> Vec<WrongRow> {
    let mut rows = Vec::new();
    for wrong in create_user.iter().filter(|wrong| wrong.rpc == CREATE_USER) {
        let request = CreateUserRequest::decode(wrong.message.clone()).expect("encoded here");
        let password_hash = match request.credential {
            Some(Credential::Password(_)) => continue,
            // Of a row it means that there is none.
            Some(Credential::PasswordHash(hash)) if hash.is_empty() => continue,
            Some(Credential::PasswordHash(hash)) => hash,
            None => String::new(),
        };
        let row = ImportUsersRow {
            email: request.email,
            username: request.username,
            full_name: request.full_name,
            password_hash,
            tier: request.tier,
            role: request.role,
            ..ImportUsersRow::default()
        };
        rows.push((wrong.field.clone(), wrong.value.clone(), row));
    }
    for id in &IDS[1..] {
        let row = ImportUsersRow {
            user_id: (*id).to_owned(),
            ..row()
        };
        rows.push(("user_id".to_owned(), (*id).to_owned(), row));
    }
    let wrong = |seconds, nanos| Timestamp { seconds, nanos };
    for time in [
        wrong(-1, 0),
        wrong(253_402_300_800, 0),
        wrong(1, -1),
        ago(-DAY),
    ] {
        let fields: [(&str, TimeOf); 3] = [
            ("email_verified_at", |row| &mut row.email_verified_at),
            ("created_at", |row| &mut row.created_at),
            ("last_login_at", |row| &mut row.last_login_at),
        ];
        for (field, of) in fields {
            let mut row = row();
            *of(&mut row) = Some(time);
            rows.push((field.to_owned(), format!("{time:?}"), row));
        }
    }
    rows
}

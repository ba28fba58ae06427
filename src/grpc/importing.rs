//! `ImportUsers`: a stream of batches, each answered before the next is read.

use std::{pin::Pin, time::Duration};

use chrono::{DateTime, Utc};
use futures_util::{Stream, stream};
use prost_types::Timestamp;
use tokio::{sync::watch, time::timeout};
use tonic::{Status, Streaming};

use super::{
    convert::{self, Fields, only},
    status,
};
use crate::{
    auth::{Auth, Import, ImportOptions, ImportRow, Imported, Principal, RowFault},
    error::{Error, FieldViolation, Result},
    model::{ImportSource, Origin, Role, Scope, Violation},
    proto::tollkeeper::admin::v1::{
        ImportUsersFailure, ImportUsersFieldFailure, ImportUsersRequest, ImportUsersResponse,
        ImportUsersRow,
    },
    usage::Usage,
};

/// Rows of a message: some 100 KB of them.
const BATCH_ROWS: usize = 500;

/// Rows of a stream: their names are remembered, some 40 MB of this many.
const STREAM_ROWS: i64 = 1_000_000;

/// For one batch; the stream has no deadline of ours.
const BATCH_WITHIN: Duration = Duration::from_secs(30);

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<ImportUsersResponse, Status>> + Send>>;

/// Who imports.
pub(super) struct Importer {
    /// It must stay good.
    pub(super) credential: String,
    pub(super) origin: Origin,
}

/// Imports what a stream brings.
pub(super) fn answer(
    auth: Auth,
    usage: Usage,
    caller: Importer,
    requests: Streaming<ImportUsersRequest>,
) -> Answers {
    let session = Session {
        closing: usage.closing(),
        auth,
        usage,
        caller,
        requests,
        import: None,
        settled: 0,
        has_ended: false,
    };
    Box::pin(stream::unfold(session, |mut session| async {
        if session.has_ended {
            return None;
        }
        let next = session.next().await.transpose()?;
        session.has_ended = next.is_err();
        Some((next, session))
    }))
}

/// A stream under way. Nothing runs but while its client waits for an answer.
struct Session {
    auth: Auth,
    usage: Usage,
    caller: Importer,
    requests: Streaming<ImportUsersRequest>,
    closing: watch::Receiver<bool>,
    /// Begun by the first batch.
    import: Option<Import>,
    settled: i64,
    has_ended: bool,
}

impl Session {
    /// The next answer; `None` at the end.
    async fn next(&mut self) -> Result<Option<ImportUsersResponse>, Status> {
        let request = tokio::select! {
            biased;
            _ = self.closing.wait_for(|closing| *closing) => return Err(status::shutting_down()),
            request = self.requests.message() => request.map_err(|error| status::explain(&error))?,
        };
        match request {
            Some(request) => match timeout(BATCH_WITHIN, self.take(request)).await {
                Ok(answer) => Ok(Some(answer?)),
                Err(_) => Err(status::deadline_exceeded()),
            },
            None => Ok(None),
        }
    }

    async fn take(&mut self, request: ImportUsersRequest) -> Result<ImportUsersResponse> {
        let now = Utc::now();
        let principal = self.auth.authenticate(&self.caller.credential, now);
        admit(&principal.await?)?;
        let (options, rows) = only(|fields| self.batch(fields, request))?;
        let numbers: Vec<i64> = rows.iter().map(|row| row.row).collect();
        let rows: Vec<ImportRow> = rows.into_iter().map(row).collect();
        let import = self.import.get_or_insert_with(|| {
            let origin = self.caller.origin.clone();
            self.auth.import(options, origin)
        });
        let outcomes = import.take(&rows, &self.usage.tiers(), now).await?;
        let mut answer = ImportUsersResponse::default();
        for (row, outcome) in numbers.into_iter().zip(outcomes) {
            self.settled += 1;
            match outcome {
                Imported::Now => answer.imported += 1,
                Imported::Before => answer.already_there += 1,
                Imported::Refused(fault) => answer.failures.push(failure(row, fault)),
            }
        }
        answer.settled = self.settled;
        Ok(answer)
    }

    /// Reads what is said of a batch as a whole.
    fn batch(
        &self,
        fields: &mut Fields,
        request: ImportUsersRequest,
    ) -> Option<(ImportOptions, Vec<ImportUsersRow>)> {
        let begun = self.import.as_ref().map(Import::options);
        let as_before = |is_so: bool| match is_so {
            true => Ok(()),
            false => Err("must be as in the first batch".into()),
        };
        let source: Option<ImportSource> = fields.parse("source", &request.source);
        if let Some((begun, source)) = begun.zip(source.as_ref()) {
            fields.take("source", as_before(*source == begun.source));
            fields.take("dry_run", as_before(request.dry_run == begun.dry_run));
            let allow_admins = request.allow_admins == begun.allow_admins;
            fields.take("allow_admins", as_before(allow_admins));
        }
        let count = request.rows.len();
        let all = self.settled.saturating_add_unsigned(count as u64);
        let rows = match count {
            1..=BATCH_ROWS if all <= STREAM_ROWS => Ok(request.rows),
            1..=BATCH_ROWS => {
                Err(format!("must be at most {STREAM_ROWS} of a stream: go on with another").into())
            }
            _ => Err(format!("must be 1 to {BATCH_ROWS}").into()),
        };
        let rows = fields.take("rows", rows);
        let options = ImportOptions {
            source: source?,
            dry_run: request.dry_run,
            allow_admins: request.allow_admins,
        };
        Some((options, rows?))
    }
}

/// Holds the rule of the call: the caller may have lost the right since.
fn admit(principal: &Principal) -> Result<()> {
    match principal {
        Principal::User(user) if user.role == Role::Admin => Ok(()),
        Principal::User(_) | Principal::Peer { .. } => Err(Error::CallerNotAllowed),
        Principal::Service { scopes, .. } if scopes.contains(Scope::Admin) => Ok(()),
        Principal::Service { .. } => Err(Error::ScopeMissing(Scope::Admin)),
    }
}

fn row(row: ImportUsersRow) -> ImportRow {
    let role = convert::role(row.role);
    ImportRow {
        row: row.row,
        user_id: row.user_id,
        email: row.email,
        username: row.username,
        full_name: row.full_name,
        password_hash: row.password_hash,
        tier: row.tier,
        role,
        is_active: Ok(row.is_active.unwrap_or(true)),
        email_verified_at: time(row.email_verified_at),
        created_at: time(row.created_at),
        last_login_at: time(row.last_login_at),
    }
}

fn time(value: Option<Timestamp>) -> Result<Option<DateTime<Utc>>, Violation> {
    let set = value.map(|value| convert::timestamp(Some(value)));
    set.transpose()
}

fn failure(row: i64, fault: RowFault) -> ImportUsersFailure {
    let (reason, message) = (status::row_reason(&fault), fault.to_string());
    let fields = fault.fields().into_iter();
    ImportUsersFailure {
        row,
        reason: reason.to_owned(),
        message,
        fields: fields
            .map(
                |FieldViolation { field, description }| ImportUsersFieldFailure {
                    field,
                    description: description.into_owned(),
                },
            )
            .collect(),
    }
}

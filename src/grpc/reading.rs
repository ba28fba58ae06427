//! Reading the ledger: what its questions mean, and the stream of an export.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use prost_types::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    access::Shown,
    convert::{self, Fields, time},
    status,
};
use crate::{
    auth::Auth,
    error::{Error, Result},
    model::{Interval, ModelName, UsageFilter, UsageGroup, UserId, Violation},
    proto::tollkeeper::usage::v1::{
        ExportSummary, ExportUsageRequest, ExportUsageResponse, ListUsageRecordsRequest,
        QueryUsageRequest, QueryUsageResponse, UsageBucket,
        export_usage_request::Format,
        export_usage_response::Content,
        query_usage_request::{self as query, GroupBy as AskedGroupBy},
        usage_series::Kind,
    },
    usage::{Export, ExportFormat, ExportPlace, GroupBy, UsageQuery, UsageSeries, UsageSeriesSet},
};

/// Whom a question names, and what it asks.
pub(super) type Asked<T> = (Option<UserId>, T);

/// Reads what usage over time is asked for.
pub(super) fn usage_query(
    fields: &mut Fields,
    message: &QueryUsageRequest,
    now: DateTime<Utc>,
) -> Option<Asked<UsageQuery>> {
    let user_id = fields.parse_optional("user_id", &message.user_id);
    let interval = fields.take("interval", interval(message.interval));
    let group_by = fields.take("group_by", asked_group_by(message.group_by));
    let label = group_by.and_then(|by| fields.take("label", label(by, &message.label)));
    let group_by = group_by.zip(label).map(|(by, key)| match by {
        AskedGroupBy::Unspecified => GroupBy::Nothing,
        AskedGroupBy::Model => GroupBy::Model,
        AskedGroupBy::Dimension => GroupBy::Dimension,
        AskedGroupBy::Label => GroupBy::Label(key.to_owned()),
    });
    let model: Option<Option<ModelName>> = fields.parse_optional("model", &message.model);
    let bounds = bounds(fields, message.start_time, message.end_time);
    let (interval, group_by) = (interval?, group_by?);
    let range = bounds.and_then(|(start, end)| {
        let range = UsageQuery::range(start, end, interval, &group_by, now);
        fields.take("start_time", range)
    })?;
    let max_groups = UsageQuery::max_groups(message.max_groups, range, interval);
    let max_groups = fields.take("max_groups", max_groups)?;
    let query = UsageQuery::new(range, interval, group_by, model?, max_groups);
    Some((user_id?, query))
}

/// Reads which records are listed.
pub(super) fn list_filter(
    fields: &mut Fields,
    message: &ListUsageRecordsRequest,
) -> Option<Asked<UsageFilter>> {
    let user_id = fields.parse_optional("user_id", &message.user_id);
    let times = (message.start_time, message.end_time);
    let filter = filter(fields, &message.month, times, &message.model);
    user_id.zip(filter)
}

/// What is exported: of whom, if not of all, which records, and how.
pub(super) struct AskedExport {
    pub(super) named: Option<UserId>,
    pub(super) all_users: bool,
    pub(super) filter: UsageFilter,
    pub(super) format: ExportFormat,
}

/// Reads what is exported.
pub(super) fn export(fields: &mut Fields, message: &ExportUsageRequest) -> Option<AskedExport> {
    let named = fields.parse_optional("user_id", &message.user_id);
    let all_users = match message.all_users {
        true if !message.user_id.is_empty() => Err("must not be set with user_id".into()),
        all_users => Ok(all_users),
    };
    let all_users = fields.take("all_users", all_users);
    let times = (message.start_time, message.end_time);
    let filter = filter(fields, &message.month, times, &message.model);
    let format = match Format::try_from(message.format) {
        Ok(Format::Unspecified | Format::Csv) => Ok(ExportFormat::Csv),
        Ok(Format::Ndjson) => Ok(ExportFormat::Ndjson),
        Err(_) => Err("must be a known format".into()),
    };
    let format = fields.take("format", format);
    Some(AskedExport {
        named: named?,
        all_users: all_users?,
        filter: filter?,
        format: format?,
    })
}

fn filter(
    fields: &mut Fields,
    month: &str,
    (start, end): (Option<Timestamp>, Option<Timestamp>),
    model: &str,
) -> Option<UsageFilter> {
    let period = fields.parse_optional("month", month);
    let model = fields.parse_optional("model", model);
    let (start, end) = ordered_bounds(fields, start, end)?;
    Some(UsageFilter {
        period: period?,
        start,
        end,
        model: model?,
    })
}

type Bound = Option<DateTime<Utc>>;

/// Reads `start_time` and `end_time` of a list, each of which may be left out.
pub(super) fn ordered_bounds(
    fields: &mut Fields,
    start: Option<Timestamp>,
    end: Option<Timestamp>,
) -> Option<(Bound, Bound)> {
    let (start, end) = bounds(fields, start, end)?;
    let holds = match start.zip(end) {
        Some((start, end)) if start >= end => Err("must be before end_time".into()),
        _ => Ok(()),
    };
    fields.take("start_time", holds).map(|()| (start, end))
}

fn bounds(
    fields: &mut Fields,
    start: Option<Timestamp>,
    end: Option<Timestamp>,
) -> Option<(Bound, Bound)> {
    let bound = |value: Option<Timestamp>| {
        value
            .map(|value| convert::timestamp(Some(value)))
            .transpose()
    };
    let start = fields.take("start_time", bound(start));
    start.zip(fields.take("end_time", bound(end)))
}

fn interval(value: i32) -> Result<Interval, Violation> {
    match query::Interval::try_from(value) {
        Ok(query::Interval::Hour) => Ok(Interval::Hour),
        Ok(query::Interval::Unspecified | query::Interval::Day) => Ok(Interval::Day),
        Ok(query::Interval::Month) => Ok(Interval::Month),
        Err(_) => Err("must be a known interval".into()),
    }
}

fn asked_group_by(value: i32) -> Result<AskedGroupBy, Violation> {
    AskedGroupBy::try_from(value).map_err(|_| "must be a known grouping".into())
}

fn label(by: AskedGroupBy, key: &str) -> Result<&str, Violation> {
    match (by, key) {
        (AskedGroupBy::Label, key) if (1..=64).contains(&key.len()) && !key.contains('\0') => {
            Ok(key)
        }
        (AskedGroupBy::Label, _) => {
            Err("must be the key of a label, 1 to 64 bytes without NUL".into())
        }
        (_, "") => Ok(key),
        _ => Err("must be empty unless group_by is GROUP_BY_LABEL".into()),
    }
}

/// The answer to a question about `user_id`.
pub(super) fn answer(user_id: UserId, answer: UsageSeriesSet) -> QueryUsageResponse {
    QueryUsageResponse {
        user_id: user_id.to_string(),
        start_time: Some(time(answer.range.start)),
        end_time: Some(time(answer.range.end)),
        series: answer.series.into_iter().map(series).collect(),
    }
}

fn series(series: UsageSeries) -> crate::proto::tollkeeper::usage::v1::UsageSeries {
    let (kind, group) = match series.group {
        UsageGroup::All => (Kind::All, String::new()),
        UsageGroup::Named(name) => (Kind::Group, name),
        UsageGroup::Unlabeled => (Kind::Unlabeled, String::new()),
        UsageGroup::Other => (Kind::Other, String::new()),
    };
    let buckets = series
        .buckets
        .into_iter()
        .map(|(start, totals)| UsageBucket {
            start_time: Some(time(start)),
            totals: Some(totals.into()),
        });
    crate::proto::tollkeeper::usage::v1::UsageSeries {
        kind: kind.into(),
        group,
        totals: Some(series.totals.into()),
        buckets: buckets.collect(),
    }
}

pub(super) type Chunks = Pin<Box<dyn Stream<Item = Result<ExportUsageResponse, Status>> + Send>>;

/// How often a credential is looked at while its reader takes nothing.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// How long a reader may take nothing.
const PATIENCE: Duration = Duration::from_secs(600);

/// Streams an export in its `place`, for the caller who has `shown` this, as fast as it is taken.
pub(super) fn chunks(
    auth: Auth,
    place: ExportPlace,
    closing: watch::Receiver<bool>,
    shown: Shown,
    export: Export,
) -> Chunks {
    let running = Running {
        _place: place,
        auth,
        shown,
        export,
        is_whole: false,
    };
    let (sender, contents) = mpsc::channel(1);
    // Of its own: nobody asks for the next message of a reader that never reads, and its place must
    // be free once its credential is good no more.
    let ended = tokio::spawn(running.pass_on(sender, closing));
    let why = ended.map(|why| why.unwrap_or_else(|_| Some(status::panicked())));
    let failure = stream::once(why).filter_map(async |why| why.map(Err));
    Box::pin(ReceiverStream::new(contents).map(Ok).chain(failure))
}

/// An export under way.
struct Running {
    _place: ExportPlace,
    auth: Auth,
    shown: Shown,
    export: Export,
    /// Whether all of it is with the reader, read or not.
    is_whole: bool,
}

impl Running {
    /// Passes on what is exported; returns why it ended too early.
    async fn pass_on(
        mut self,
        reader: mpsc::Sender<ExportUsageResponse>,
        mut closing: watch::Receiver<bool>,
    ) -> Option<Status> {
        let ended = tokio::select! {
            biased;
            _ = closing.wait_for(|closing| *closing) => Some(status::shutting_down()),
            // Nobody hears why.
            () = reader.closed() => None,
            passed = self.pass_all_on(&reader) => passed.err(),
        };
        ended.filter(|_| !self.is_whole)
    }

    async fn pass_all_on(
        &mut self,
        reader: &mpsc::Sender<ExportUsageResponse>,
    ) -> Result<(), Status> {
        loop {
            let chunk = self.export.next_chunk().await?;
            let is_last = chunk.is_none();
            let content = match chunk {
                Some(chunk) => Content::Data(chunk.into()),
                None => {
                    let written = self.export.written();
                    Content::Summary(ExportSummary {
                        record_count: written.records.cast_signed(),
                        byte_count: written.bytes.cast_signed(),
                    })
                }
            };
            self.room(reader).await?.send(ExportUsageResponse {
                content: Some(content),
            });
            if is_last {
                self.is_whole = true;
                // As long as something of it is unread here, it keeps its place.
                return self.room(reader).await.map(drop);
            }
        }
    }

    async fn room<'a, T>(
        &self,
        reader: &'a mpsc::Sender<T>,
    ) -> Result<mpsc::Permit<'a, T>, Status> {
        let check = || self.shown.check(&self.auth);
        room_of(reader, CHECK_EVERY, PATIENCE, check).await
    }
}

/// Room for one more with a reader, for as long as a `check` made at first and `every` so often says
/// that it may. An outage ends only what would go on: a reader that takes nothing outlasts it.
async fn room_of<T, C: Future<Output = Result<()>>>(
    reader: &mpsc::Sender<T>,
    every: Duration,
    patience: Duration,
    check: impl Fn() -> C,
) -> Result<mpsc::Permit<'_, T>, Status> {
    let end = Instant::now() + patience;
    loop {
        let is_known = match check().await {
            Err(Error::Unavailable(_)) if reader.capacity() == 0 => false,
            checked => checked.map(|()| true)?,
        };
        match timeout(every, reader.reserve()).await {
            Ok(Ok(_)) if !is_known => {}
            Ok(room) => return room.map_err(|_| status::deadline_exceeded()),
            Err(_) if Instant::now() >= end => return Err(status::deadline_exceeded()),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const EVERY: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_waited_for_and_not_for_ever() {
        let (reader, mut taken) = mpsc::channel(1);
        let forever = Duration::from_secs(600);
        let good = async || Ok(());
        room_of(&reader, EVERY, forever, good)
            .await
            .expect("there is room")
            .send(1);
        let patience = Duration::from_millis(20);
        let begun = Instant::now();
        let ended = room_of(&reader, EVERY, patience, good)
            .await
            .expect_err("it ends");
        assert_eq!(ended.code(), tonic::Code::DeadlineExceeded);
        assert!(begun.elapsed() >= patience);
        let (room, _) = tokio::join!(room_of(&reader, EVERY, forever, good), async {
            tokio::time::sleep(patience).await;
            taken.recv().await
        });
        room.expect("there is room");
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_sent_away_once_its_credential_is_bad() {
        let (reader, _taken) = mpsc::channel(1);
        let looks = Cell::new(0);
        let check = async || match looks.replace(looks.get() + 1) {
            0..3 => Ok(()),
            _ => Err(Error::CredentialMissing),
        };
        let forever = Duration::from_secs(600);
        room_of(&reader, EVERY, forever, check)
            .await
            .expect("there is room")
            .send(1);
        let ended = room_of(&reader, EVERY, forever, check)
            .await
            .expect_err("it ends");
        assert_eq!(ended.code(), tonic::Code::Unauthenticated);
        assert_eq!(looks.get(), 4);
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_outlasts_an_outage_and_gets_nothing_in_one() {
        let (reader, mut taken) = mpsc::channel(1);
        let is_away = Cell::new(false);
        let check = async || match is_away.get() {
            true => Err(Error::Unavailable("away".into())),
            false => Ok(()),
        };
        let forever = Duration::from_secs(600);
        let room = async || room_of(&reader, EVERY, forever, check).await;
        room().await.expect("there is room").send(1);
        is_away.set(true);
        let (next, ()) = tokio::join!(room(), async {
            tokio::time::sleep(20 * EVERY).await;
            is_away.set(false);
            taken.recv().await;
        });
        next.expect("there is room").send(2);
        is_away.set(true);
        let (next, _) = tokio::join!(room(), async {
            tokio::time::sleep(20 * EVERY).await;
            taken.recv().await
        });
        let ended = next.expect_err("it ends");
        assert_eq!(ended.code(), tonic::Code::Unavailable);
    }
}

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Datelike as _, TimeDelta, Timelike as _, Utc};
use tollkeeper::{
    model::Period,
    proto::tollkeeper::usage::v1::{
        BatchRecordUsageRequest, QueryUsageRequest, QueryUsageResponse, TokenCounts, UsageEvent,
        UsageSeries, UsageTotals,
        query_usage_request::{GroupBy, Interval},
        usage_series::Kind,
    },
};
use tonic::{Code, Status};
use uuid::Uuid;

use super::{at, event, tokens};
use crate::harness::{TestApp, eventually, reason};

/// By bucket, what was used.
type Buckets = BTreeMap<DateTime<Utc>, UsageTotals>;

#[tokio::test(flavor = "multi_thread")]
async fn every_question_is_answered_by_the_sums_of_the_events() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let now = Utc::now();
    let events = scattered(&user.id, now, 700);
    book(&app, &events).await;
    book(&app, &scattered(&other.id, now, 50)).await;
    let this = Period::containing(now);
    let days = TimeDelta::days;
    let ranges = [
        (this.previous().start(), this.end()),
        (this.start(), this.end()),
        (now - days(33), now - days(2)),
        (this.start() - days(2), this.start() + days(2)),
        // Odd ends: the first and the last bucket are parts.
        (
            now - TimeDelta::seconds(987_654),
            now - TimeDelta::milliseconds(1234),
        ),
        (now - TimeDelta::microseconds(1), now),
    ];
    let groups = [
        (GroupBy::Unspecified, ""),
        (GroupBy::Model, ""),
        (GroupBy::Dimension, ""),
        (GroupBy::Label, "team"),
        (GroupBy::Label, "nobody has it"),
    ];
    let mut asked = 0;
    for (start, end) in ranges {
        for interval in [Interval::Hour, Interval::Day, Interval::Month] {
            if interval == Interval::Hour && end - start > days(41) {
                continue;
            }
            for (group_by, label) in groups {
                for (model, max_groups) in [("", 0), ("model-1", 0), ("", 2)] {
                    let request = QueryUsageRequest {
                        user_id: user.id.clone(),
                        start_time: Some(at(start)),
                        end_time: Some(at(end)),
                        interval: interval.into(),
                        group_by: group_by.into(),
                        label: label.to_owned(),
                        model: model.to_owned(),
                        max_groups,
                    };
                    check(&app, &events, &request).await;
                    asked += 1;
                }
            }
        }
    }
    assert!(asked > 200, "{asked} questions");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_bounds_the_last_intervals_are_shown_with_the_current_one() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    let token = app.login(&user).await.access_token;
    for (interval, buckets) in [
        (Interval::Unspecified, 30),
        (Interval::Hour, 24),
        (Interval::Day, 30),
        (Interval::Month, 12),
    ] {
        let request = QueryUsageRequest {
            interval: interval.into(),
            ..QueryUsageRequest::default()
        };
        let answer = app.usage(&token).query_usage(request).await.unwrap();
        let answer = answer.into_inner();
        assert_eq!(answer.user_id, user.id);
        let [series] = &answer.series[..] else {
            panic!("one series in {answer:?}");
        };
        assert_eq!(series.kind(), Kind::All);
        assert_eq!(series.buckets.len(), buckets);
        let now = at(Utc::now());
        let (first, last) = (&series.buckets[0], &series.buckets[buckets - 1]);
        assert_eq!(first.start_time, answer.start_time);
        assert!(answer.end_time.unwrap().seconds > now.seconds);
        assert!(last.start_time.unwrap().seconds <= now.seconds);
        // The hour may have turned since it was booked.
        assert_eq!(series.totals.unwrap().total_tokens, 132);
        assert_eq!(series.totals.unwrap().request_count, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_that_is_empty_is_another_group_than_none() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (label, input) in [(Some(""), 3), (None, 2), (Some("blue"), 1)] {
        let labels = label.map(|value| ("team".to_owned(), value.to_owned()));
        let event = UsageEvent {
            labels: labels.into_iter().collect(),
            tokens: tokens(input),
            ..event(&user.id)
        };
        app.record(&event).await.unwrap();
    }
    let by_team = QueryUsageRequest {
        user_id: user.id,
        group_by: GroupBy::Label.into(),
        label: "team".to_owned(),
        ..QueryUsageRequest::default()
    };
    let groups = |answer: QueryUsageResponse| -> Vec<(Kind, String, i64)> {
        let series = answer.series.into_iter();
        series
            .map(|one| (one.kind(), one.group, one.totals.unwrap().total_tokens))
            .collect()
    };
    let answer = ask(&app, &by_team).await.unwrap();
    let (named, none) = (Kind::Group, String::new);
    assert_eq!(
        groups(answer),
        [
            (named, none(), 3),
            (Kind::Unlabeled, none(), 2),
            (named, "blue".to_owned(), 1)
        ]
    );
    let largest = QueryUsageRequest {
        max_groups: 1,
        ..by_team
    };
    let answer = ask(&app, &largest).await.unwrap();
    assert_eq!(
        groups(answer),
        [(named, none(), 3), (Kind::Other, none(), 3)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_beyond_the_most_that_may_be_shown_are_one() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let events: Vec<UsageEvent> = (1..=150)
        .map(|n| UsageEvent {
            model: format!("model-{n}"),
            tokens: tokens(n),
            ..event(&user.id)
        })
        .collect();
    book(&app, &events).await;
    for (max_groups, shown) in [(0, 20), (1, 1), (100, 100)] {
        for interval in [Interval::Day, Interval::Month] {
            let request = QueryUsageRequest {
                user_id: user.id.clone(),
                interval: interval.into(),
                group_by: GroupBy::Model.into(),
                max_groups,
                ..QueryUsageRequest::default()
            };
            let answer = ask(&app, &request).await.unwrap();
            let (other, largest) = answer.series.split_last().unwrap();
            let names: Vec<&str> = largest.iter().map(|one| one.group.as_str()).collect();
            let wanted: Vec<String> = (0..shown).map(|n| format!("model-{}", 150 - n)).collect();
            assert_eq!(names, wanted);
            assert_eq!(other.kind(), Kind::Other);
            let rest: i64 = (1..=150 - shown).sum();
            assert_eq!(other.totals.unwrap().total_tokens, rest);
            assert_eq!(other.totals.unwrap().request_count, 150 - shown);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_months_outlive_the_records() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    app.sql("TRUNCATE usage_records").await;
    let request = |interval: Interval, group_by: GroupBy| QueryUsageRequest {
        user_id: user.id.clone(),
        interval: interval.into(),
        group_by: group_by.into(),
        ..QueryUsageRequest::default()
    };
    for group_by in [GroupBy::Unspecified, GroupBy::Model, GroupBy::Dimension] {
        let months = ask(&app, &request(Interval::Month, group_by))
            .await
            .unwrap();
        let totals = months.series.iter().map(|one| one.totals.unwrap());
        let tokens: i64 = totals.map(|totals| totals.total_tokens).sum();
        assert_eq!(tokens, 132, "{group_by:?}");
    }
    let days = ask(&app, &request(Interval::Day, GroupBy::Unspecified)).await;
    assert_eq!(days.unwrap().series[0].totals.unwrap().total_tokens, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn most_intervals_and_days_that_are_answered() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let start = Period::containing(Utc::now()).start();
    let hours = |n: i64| start + TimeDelta::hours(n);
    let days = |n: i64| hours(n * 24);
    let months = |n| Period::containing(start).plus_months(n).start();
    let (h, d, m) = (Interval::Hour, Interval::Day, Interval::Month);
    for (interval, end, max_groups, fits) in [
        (h, hours(1000), 0, Ok(1000)),
        (h, hours(1000), 30, Ok(1000)),
        (h, hours(1000), 31, Err("max_groups")),
        (h, hours(300), 100, Ok(300)),
        (h, hours(1001), 0, Err("start_time")),
        (d, days(366), 0, Ok(366)),
        (
            d,
            days(366) + TimeDelta::microseconds(1),
            0,
            Err("start_time"),
        ),
        (m, months(1000), 0, Ok(1000)),
        (m, months(1001), 0, Err("start_time")),
    ] {
        let request = QueryUsageRequest {
            user_id: user.id.clone(),
            start_time: Some(at(start)),
            end_time: Some(at(end)),
            interval: interval.into(),
            max_groups,
            ..QueryUsageRequest::default()
        };
        match (ask(&app, &request).await, fits) {
            (Ok(answer), Ok(buckets)) => assert_eq!(answer.series[0].buckets.len(), buckets),
            (Err(status), Err(field)) => {
                use tonic_types::StatusExt as _;
                assert_eq!(status.code(), Code::InvalidArgument);
                let fields = status.get_details_bad_request().unwrap().field_violations;
                assert_eq!(fields[0].field, field);
            }
            (answer, _) => panic!("{interval:?} to {end}, {max_groups}: {answer:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_user_is_not_found() {
    let app = TestApp::spawn().await;
    let request = QueryUsageRequest {
        user_id: Uuid::now_v7().to_string(),
        ..QueryUsageRequest::default()
    };
    let refused = ask(&app, &request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(reason(&refused), "USER_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_read_by_their_index_and_whole_months_not_at_all() {
    /// How many rows were read otherwise than by an index, and how often by one.
    async fn scans(app: &TestApp) -> (i64, i64) {
        let rows = app
            .sql(
                "SELECT sum(seq_tup_read)::bigint, sum(coalesce(idx_scan, 0))::bigint
                 FROM pg_stat_user_tables WHERE relname LIKE 'usage\\_records\\_%'",
            )
            .await;
        (rows[0].get(0), rows[0].get(1))
    }
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    // As many others' as make reading them all the worse way.
    app.sql(
        "INSERT INTO usage_records
         SELECT to_char(t, 'YYYY-MM'), gen_random_uuid(), gen_random_uuid(), t, 'm', 1, 0, 0, 0, 0
         FROM generate_series(now() - interval '40 days', now(), interval '90 seconds') AS t",
    )
    .await;
    app.sql("ANALYZE usage_records").await;
    let months = QueryUsageRequest {
        user_id: user.id.clone(),
        interval: Interval::Month.into(),
        group_by: GroupBy::Model.into(),
        ..QueryUsageRequest::default()
    };
    let mut of_records = 0;
    let mut before = None;
    for interval in [Interval::Hour, Interval::Day, Interval::Month] {
        for group_by in [GroupBy::Unspecified, GroupBy::Model, GroupBy::Label] {
            let label = if group_by == GroupBy::Label {
                "team"
            } else {
                ""
            };
            let request = QueryUsageRequest {
                user_id: user.id.clone(),
                start_time: Some(at(Utc::now() - TimeDelta::days(20))),
                end_time: Some(at(Utc::now() + TimeDelta::seconds(1))),
                interval: interval.into(),
                group_by: group_by.into(),
                label: label.to_owned(),
                ..QueryUsageRequest::default()
            };
            // More often than a prepared statement is planned with its values.
            for _ in 0..7 {
                if before.is_none() {
                    before = Some(scans(&app).await);
                }
                let answer = ask(&app, &request).await.unwrap();
                let total = answer.series[0].totals.unwrap().total_tokens;
                assert_eq!(total, 132);
                ask(&app, &months).await.unwrap();
                of_records += 1;
            }
        }
    }
    let (whole_before, by_index_before) = before.unwrap();
    // A session of Postgres tells what it did a while later.
    eventually("Postgres counts the reads", async || {
        let (whole, by_index) = scans(&app).await;
        assert_eq!(whole, whole_before, "rows read without an index");
        by_index >= by_index_before + of_records
    })
    .await;
}

/// Asks, and holds every series against what the events add up to.
async fn check(app: &TestApp, events: &[UsageEvent], request: &QueryUsageRequest) {
    let answer = ask(app, request).await.unwrap();
    assert_eq!(answer.start_time, request.start_time);
    assert_eq!(answer.end_time, request.end_time);
    let wanted = wanted(events, request);
    let starts = starts(request);
    assert_eq!(
        answer.series.len(),
        wanted.len(),
        "{request:?}: {:?}",
        wanted.keys()
    );
    for series in &answer.series {
        let key = (series.kind(), series.group.clone());
        let mut used = wanted.get(&key).expect("a group of the events").clone();
        let got: Vec<DateTime<Utc>> = series
            .buckets
            .iter()
            .map(|bucket| instant(bucket.start_time.unwrap()))
            .collect();
        assert_eq!(got, starts, "no gap: {request:?}");
        let mut sum = UsageTotals::default();
        for (start, bucket) in got.iter().zip(&series.buckets) {
            let totals = used.remove(start).unwrap_or_else(|| UsageTotals {
                tokens: Some(TokenCounts::default()),
                ..UsageTotals::default()
            });
            assert_eq!(bucket.totals, Some(totals), "{key:?} {start} {request:?}");
            add(&mut sum, &totals);
        }
        assert!(used.is_empty(), "{used:?} of {request:?}");
        sum.tokens.get_or_insert_default();
        assert_eq!(series.totals, Some(sum), "{key:?} of {request:?}");
    }
    if request.group_by() != GroupBy::Dimension {
        let ranked = answer.series.iter().filter(|one| one.kind() != Kind::Other);
        let sizes: Vec<i64> = ranked.map(size).collect();
        assert!(
            sizes.is_sorted_by(|a, b| a >= b),
            "largest first: {sizes:?}"
        );
    }
}

fn size(series: &UsageSeries) -> i64 {
    series.totals.unwrap().total_tokens
}

/// The series that the events make.
fn wanted(events: &[UsageEvent], request: &QueryUsageRequest) -> BTreeMap<(Kind, String), Buckets> {
    let (start, end) = (
        instant(request.start_time.unwrap()),
        instant(request.end_time.unwrap()),
    );
    let mut groups: BTreeMap<(Kind, String), Buckets> = BTreeMap::new();
    match request.group_by() {
        GroupBy::Unspecified => {
            groups.insert((Kind::All, String::new()), Buckets::new());
        }
        GroupBy::Dimension => {
            for name in [
                "input",
                "output",
                "cached_input",
                "cache_write",
                "reasoning",
            ] {
                groups.insert((Kind::Group, name.to_owned()), Buckets::new());
            }
        }
        GroupBy::Model | GroupBy::Label => {}
    }
    for event in events {
        let instant = instant(event.occurred_at.unwrap());
        let is_meant = request.model.is_empty() || request.model == event.model;
        if instant < start || instant >= end || !is_meant {
            continue;
        }
        let bucket = floor(instant, request.interval());
        let tokens = event.tokens.unwrap();
        let mut count = |kind, group: &str, tokens: TokenCounts| {
            let totals = UsageTotals {
                tokens: Some(tokens),
                total_tokens: total(&tokens),
                request_count: 1,
            };
            let group = groups.entry((kind, group.to_owned())).or_default();
            add(group.entry(bucket).or_default(), &totals);
        };
        match request.group_by() {
            GroupBy::Unspecified => count(Kind::All, "", tokens),
            GroupBy::Model => count(Kind::Group, &event.model, tokens),
            GroupBy::Label => match event.labels.get(&request.label) {
                Some(value) => count(Kind::Group, value, tokens),
                None => count(Kind::Unlabeled, "", tokens),
            },
            GroupBy::Dimension => {
                let none = TokenCounts::default();
                let TokenCounts {
                    input,
                    output,
                    cached_input,
                    cache_write,
                    reasoning,
                } = tokens;
                count(Kind::Group, "input", TokenCounts { input, ..none });
                count(Kind::Group, "output", TokenCounts { output, ..none });
                count(
                    Kind::Group,
                    "cached_input",
                    TokenCounts {
                        cached_input,
                        ..none
                    },
                );
                count(
                    Kind::Group,
                    "cache_write",
                    TokenCounts {
                        cache_write,
                        ..none
                    },
                );
                count(Kind::Group, "reasoning", TokenCounts { reasoning, ..none });
            }
        }
    }
    if matches!(request.group_by(), GroupBy::Model | GroupBy::Label) {
        keep_largest(groups, if request.max_groups == 0 { 20 } else { 2 })
    } else {
        groups
    }
}

/// Puts all groups but the largest together.
fn keep_largest(
    groups: BTreeMap<(Kind, String), Buckets>,
    count: usize,
) -> BTreeMap<(Kind, String), Buckets> {
    let size = |buckets: &Buckets| -> i64 { buckets.values().map(|used| used.total_tokens).sum() };
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|(_, buckets)| -size(buckets));
    let sizes: BTreeSet<i64> = groups.iter().map(|(_, buckets)| size(buckets)).collect();
    assert_eq!(
        sizes.len(),
        groups.len(),
        "which are the largest is certain"
    );
    let rest = groups.split_off(count.min(groups.len()));
    let mut kept: BTreeMap<_, _> = groups.into_iter().collect();
    for (start, totals) in rest.into_iter().flat_map(|(_, buckets)| buckets) {
        let other = kept.entry((Kind::Other, String::new())).or_default();
        add(other.entry(start).or_default(), &totals);
    }
    kept
}

/// Where the buckets of a question begin.
fn starts(request: &QueryUsageRequest) -> Vec<DateTime<Utc>> {
    let end = instant(request.end_time.unwrap());
    let mut hour = floor(instant(request.start_time.unwrap()), request.interval());
    let mut starts = Vec::new();
    while hour < end {
        if floor(hour, request.interval()) == hour {
            starts.push(hour);
        }
        hour += TimeDelta::hours(1);
    }
    starts
}

fn floor(instant: DateTime<Utc>, interval: Interval) -> DateTime<Utc> {
    let hour = instant
        .with_nanosecond(0)
        .and_then(|instant| instant.with_second(0))
        .and_then(|instant| instant.with_minute(0));
    match interval {
        Interval::Hour => hour,
        Interval::Unspecified | Interval::Day => hour.and_then(|hour| hour.with_hour(0)),
        Interval::Month => hour
            .and_then(|hour| hour.with_hour(0))
            .and_then(|day| day.with_day(1)),
    }
    .expect("UTC has every hour")
}

fn instant(time: prost_types::Timestamp) -> DateTime<Utc> {
    DateTime::from_timestamp(time.seconds, time.nanos.cast_unsigned()).expect("in range")
}

fn total(tokens: &TokenCounts) -> i64 {
    tokens.input + tokens.output + tokens.cached_input + tokens.cache_write + tokens.reasoning
}

fn add(to: &mut UsageTotals, more: &UsageTotals) {
    let (sum, more_tokens) = (to.tokens.get_or_insert_default(), more.tokens.unwrap());
    sum.input += more_tokens.input;
    sum.output += more_tokens.output;
    sum.cached_input += more_tokens.cached_input;
    sum.cache_write += more_tokens.cache_write;
    sum.reasoning += more_tokens.reasoning;
    to.total_tokens += more.total_tokens;
    to.request_count += more.request_count;
}

/// Events over the last 34 days, with every kind of gap: models, labels and dimensions that few have.
fn scattered(user_id: &str, now: DateTime<Utc>, count: u64) -> Vec<UsageEvent> {
    // xorshift64: the same events every time, but for where they are put.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        i64::try_from(state % below).expect("small")
    };
    let this = Period::containing(now).start();
    let event = |n| {
        // Some at the very turn of the month, or of a day.
        let occurred_at = match n % 10 {
            0 => this - TimeDelta::microseconds(random(3) - 1),
            1 => floor(now, Interval::Day) - TimeDelta::days(random(20)),
            _ => now - TimeDelta::microseconds(random(34 * 86_400_000_000)),
        };
        let mut dimension = || if random(3) == 0 { random(100_000) } else { 0 };
        let counts = TokenCounts {
            input: 1 + dimension(),
            output: dimension(),
            cached_input: dimension(),
            cache_write: dimension(),
            reasoning: dimension(),
        };
        let teams = ["red", "blue", "", "rare", "=green", "größe"];
        let mut labels = vec![("feature".to_owned(), format!("f{}", random(300)))];
        if random(3) > 0 {
            let team = teams[usize::try_from(random(6)).expect("small")];
            labels.push(("team".to_owned(), team.to_owned()));
        }
        UsageEvent {
            occurred_at: Some(at(occurred_at.min(now))),
            model: format!("model-{}", random(5)),
            tokens: Some(counts),
            labels: labels.into_iter().collect(),
            ..event(user_id)
        }
    };
    (0..count).map(event).collect()
}

async fn book(app: &TestApp, events: &[UsageEvent]) {
    let request = BatchRecordUsageRequest {
        events: events.to_vec(),
    };
    let mut usage = app.usage(&app.service_key);
    let results = usage.batch_record_usage(request).await.unwrap();
    for result in results.into_inner().results {
        use tollkeeper::proto::tollkeeper::usage::v1::usage_result::Result;
        assert!(matches!(result.result, Some(Result::Outcome(_))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_beyond_what_a_number_holds_are_the_largest_number() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let this = Period::containing(Utc::now());
    app.sql(&format!(
        "INSERT INTO monthly_model_usage
         SELECT '{}', '{this}', 'm' || n, {}, 0, 0, 0, 0, 1 FROM generate_series(1, 2) AS n",
        user.id,
        i64::MAX
    ))
    .await;
    let request = QueryUsageRequest {
        user_id: user.id.clone(),
        interval: Interval::Month.into(),
        start_time: Some(at(this.start())),
        end_time: Some(at(this.end())),
        ..QueryUsageRequest::default()
    };
    let answer = ask(&app, &request).await.unwrap();
    let totals = answer.series[0].totals.as_ref().unwrap();
    assert_eq!(totals.tokens.unwrap().input, i64::MAX);
    assert_eq!(totals.total_tokens, i64::MAX);
    assert_eq!(totals.request_count, 2);
}

async fn ask(app: &TestApp, request: &QueryUsageRequest) -> Result<QueryUsageResponse, Status> {
    let mut usage = app.usage(&app.service_key);
    Ok(usage.query_usage(request.clone()).await?.into_inner())
}

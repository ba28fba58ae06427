use std::iter;

use chrono::{DateTime, Utc};
use terminal_size::{Width, terminal_size};

use super::{By, NamedUser, ReportArgs, month};
use crate::cli::{numbers::grouped, print};
use crate::{
    model::{Interval, Period, ReportBy, ReportLine, TimeRange, UsageTotals},
    store::Store,
};

/// Columns of a chart without a terminal.
const USUAL_WIDTH: usize = 80;
/// A bar in eighths of a column, from one to a whole.
const EIGHTHS: [char; 8] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];

/// A report as asked for.
pub(super) struct Report {
    period: Period,
    by: By,
    user: Option<NamedUser>,
    top: u16,
    now: DateTime<Utc>,
}

impl Report {
    pub(super) fn read(args: ReportArgs, now: DateTime<Utc>) -> anyhow::Result<Self> {
        Ok(Self {
            period: month(args.month.as_deref())?.unwrap_or_else(|| Period::containing(now)),
            by: args.by,
            user: args.user.as_deref().map(NamedUser::read).transpose()?,
            top: args.top,
            now,
        })
    }

    pub(super) async fn run(self, store: &Store) -> anyhow::Result<()> {
        let user_id = match &self.user {
            Some(user) => Some(user.find(store).await?),
            None => None,
        };
        let (by, name) = match self.by {
            By::Model => (ReportBy::Model, "model"),
            By::User => (ReportBy::User, "user"),
            By::Day => (ReportBy::Day, "day"),
        };
        let lines = store
            .usage_report(self.period, by, user_id, self.top.into())
            .await?;
        if lines.is_empty() {
            return print(format!("no usage in {}\n", self.period).as_bytes());
        }
        let all: UsageTotals = lines.iter().map(|line| line.totals).sum();
        let lines = match self.by {
            By::Day => all_days(lines, self.period, self.now),
            By::Model | By::User => lines,
        };
        let lines: Vec<(String, UsageTotals)> = lines
            .into_iter()
            .map(|line| (label(line.name, line.members), line.totals))
            .collect();
        let width = terminal_size().map_or(USUAL_WIDTH, |(Width(columns), _)| columns.into());
        let (table, chart) = (table(name, &lines, all), chart(&lines, all, width));
        let report = format!("{} by {name}, tokens\n\n{table}\n{chart}", self.period);
        print(report.as_bytes())
    }
}

fn label(name: Option<String>, members: i64) -> String {
    name.unwrap_or_else(|| match members {
        1 => "1 other".to_owned(),
        count => format!("{count} others"),
    })
}

/// Adds the days without usage, but for those that are yet to come.
fn all_days(lines: Vec<ReportLine>, period: Period, now: DateTime<Utc>) -> Vec<ReportLine> {
    let today = now.format("%Y-%m-%d").to_string();
    let has_come = |line: &ReportLine| {
        line.totals.request_count > 0 || line.name.as_ref().is_some_and(|day| *day <= today)
    };
    let range = TimeRange {
        start: period.start(),
        end: period.end(),
    };
    let mut lines = lines.into_iter().peekable();
    let day = |start: DateTime<Utc>| {
        let name = Some(start.format("%Y-%m-%d").to_string());
        lines
            .next_if(|line| line.name == name)
            .unwrap_or(ReportLine {
                name,
                members: 1,
                totals: UsageTotals::default(),
            })
    };
    let days = Interval::Day.starts(range).map(day);
    days.filter(has_come).collect()
}

fn table(name: &str, lines: &[(String, UsageTotals)], all: UsageTotals) -> String {
    let heads = [
        "requests",
        "input",
        "output",
        "cached input",
        "cache write",
        "reasoning",
        "total",
    ];
    let head = iter::once(name.to_owned()).chain(heads.map(str::to_owned));
    let mut rows: Vec<Vec<String>> = vec![head.collect()];
    let sum = ("all".to_owned(), all);
    for (name, totals) in lines.iter().chain([&sum]) {
        let tokens = totals.tokens;
        let numbers = [
            totals.request_count,
            tokens.input,
            tokens.output,
            tokens.cached_input,
            tokens.cache_write,
            tokens.reasoning,
            tokens.total(),
        ];
        rows.push(
            iter::once(name.clone())
                .chain(numbers.map(grouped))
                .collect(),
        );
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=heads.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        text.push_str(&format!("{:<1$}", row[0], widths[0]));
        for (number, width) in row.iter().zip(&widths).skip(1) {
            text.push_str(&format!("  {number:>width$}"));
        }
        text.push('\n');
    }
    text
}

/// A bar for every line, the largest as wide as there is room.
fn chart(lines: &[(String, UsageTotals)], all: UsageTotals, width: usize) -> String {
    let size = |totals: &UsageTotals| totals.tokens.total();
    let names = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let largest = lines.iter().map(|(_, totals)| size(totals)).max();
    let share = |of: i64, whole: i64| of as f64 / whole.max(1) as f64;
    // Two spaces before the bar, " 100.0 %" behind it.
    let room = width.saturating_sub(names + 10).clamp(10, 60);
    let mut text = String::new();
    for (name, totals) in lines {
        let eighths = share(size(totals), largest.unwrap_or(0)) * (room * 8) as f64;
        let percent = share(size(totals), size(&all)) * 100.0;
        let bar = bar(eighths.round() as usize);
        let line = format!("{name:<names$}  {bar:<room$} {percent:>5.1} %");
        text.push_str(&line);
        text.push('\n');
    }
    text
}

fn bar(eighths: usize) -> String {
    let whole = iter::repeat_n(EIGHTHS[7], eighths / 8);
    let part = (eighths % 8).checked_sub(1).map(|part| EIGHTHS[part]);
    whole.chain(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TokenCounts;

    fn used(input: i64) -> UsageTotals {
        UsageTotals {
            tokens: TokenCounts {
                input,
                ..TokenCounts::default()
            },
            request_count: 1,
        }
    }

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
            (i64::MAX, "9,223,372,036,854,775,807"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn bars_are_as_long_as_their_share() {
        let lines: Vec<_> = [800, 400, 1, 0]
            .map(|tokens| (format!("m{tokens}"), used(tokens)))
            .into();
        let chart = chart(&lines, used(1201), 4 + 10 + 10);
        let wanted = [
            "m800  ██████████  66.6 %",
            "m400  █████       33.3 %",
            "m1                 0.1 %",
            "m0                 0.0 %",
        ];
        assert_eq!(chart.lines().collect::<Vec<_>>(), wanted);
        assert_eq!(bar(13), "█▋");
    }

    #[test]
    fn columns_of_a_table_are_aligned() {
        let lines = [("a-model".to_owned(), used(1_000_000))];
        let table = table("model", &lines, used(1_000_000));
        let widths: Vec<usize> = table.lines().map(str::len).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
        assert!(table.ends_with("1,000,000\n"));
    }

    #[test]
    fn a_month_has_all_its_days_up_to_now() {
        let period: Period = "2026-02".parse().expect("valid");
        let line = |day: &str| ReportLine {
            name: Some(day.to_owned()),
            members: 1,
            totals: used(1),
        };
        let lines = vec![line("2026-02-02"), line("2026-02-20")];
        let days = |now| all_days(lines.clone(), period, now);
        assert_eq!(days(period.end()).len(), 28);
        let used = days(period.end());
        let used = used.iter().filter(|day| day.totals.request_count == 1);
        assert_eq!(used.count(), 2);
        let tenth = days(period.start() + chrono::TimeDelta::days(9));
        let names: Vec<_> = tenth.iter().filter_map(|day| day.name.as_deref()).collect();
        // What a clock ahead of this one booked is shown.
        assert_eq!(names[9..], ["2026-02-10", "2026-02-20"]);
    }
}

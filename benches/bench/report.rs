//! Rounds of slices into medians and ratios; as a table, as JSON and as a chart.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::ensure;
use serde_json::{Value, json};

use crate::load::Slice;

/// All rounds of one part under one load.
pub(crate) struct Row {
    pub(crate) part: &'static str,
    pub(crate) title: String,
    pub(crate) rounds: Vec<Slice>,
}

/// Rows that were measured in turns, so that a round's slices may be compared.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) rows: Vec<Row>,
}

/// A median with the extremes around it.
#[derive(Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else {
            return Self {
                median: f64::NAN,
                min: f64::NAN,
                max: f64::NAN,
            };
        };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Self { median, min, max }
    }

    pub(crate) fn json(self) -> Value {
        json!({"median": self.median, "min": self.min, "max": self.max})
    }
}

impl Row {
    pub(crate) fn new(part: &'static str, title: String) -> Self {
        Self {
            part,
            title,
            rounds: Vec::new(),
        }
    }

    pub(crate) fn spread(&self, of: impl Fn(&Slice) -> f64) -> Spread {
        Spread::of(self.rounds.iter().map(of))
    }

    /// Round by round against another row: what the neighbours of the machine do hits both alike.
    pub(crate) fn ratio(&self, to: &Self, of: impl Fn(&Slice) -> f64) -> Spread {
        let pairs = self.rounds.iter().zip(&to.rounds);
        Spread::of(pairs.map(|(a, b)| of(a) / of(b)))
    }

    fn json(&self, base: Option<&Self>) -> Value {
        json!({
            "part": self.part,
            "title": self.title,
            "per_second": self.spread(Slice::per_second).json(),
            "server_cpu_us": self.spread(Slice::cpu_us_per_call).json(),
            "of_it_postgres_us": self.spread(|s| s.postgres_cpu_us / s.calls as f64).json(),
            "client_cpu_us": self.spread(|s| s.client_cpu_us / s.calls as f64).json(),
            "p50_us": self.spread(|s| s.p50_us).json(),
            "p99_us": self.spread(|s| s.p99_us).json(),
            "request_bytes": self.spread(|s| s.request_bytes).median,
            "response_bytes": self.spread(|s| s.response_bytes).median,
            "per_second_ratio": base.map(|b| self.ratio(b, Slice::per_second).json()),
            "server_cpu_ratio": base.map(|b| self.ratio(b, Slice::cpu_us_per_call).json()),
            "p50_ratio": base.map(|b| self.ratio(b, |s| s.p50_us).json()),
            "p99_ratio": base.map(|b| self.ratio(b, |s| s.p99_us).json()),
            "wrong": self.rounds.iter().map(|s| s.wrong).sum::<u64>(),
            "rounds": self.rounds.iter().map(|s| json!({
                "calls": s.calls, "seconds": s.seconds, "per_second": s.per_second(),
                "server_cpu_us": s.cpu_us_per_call(), "p50_us": s.p50_us, "p99_us": s.p99_us,
            })).collect::<Vec<_>>(),
        })
    }
}

impl Panel {
    pub(crate) fn row(&self, part: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.part == part)
    }

    /// Prints the rows with their ratios to the rows `base`, an echo, and `other`.
    pub(crate) fn print(&self, base: &str, other: &str) {
        self.print_with(base, other, "× echo", "× def.");
    }

    /// [`Self::print`] with names for the two.
    pub(crate) fn print_with(&self, base: &str, other: &str, times_base: &str, times_other: &str) {
        println!("\n{}", self.title);
        println!(
            "  {:<44} {:>9} {:>7} {:>11} {:>7} {:>7} {:>7} {:>9} {:>9}",
            "",
            "calls/s",
            times_base,
            "spread",
            times_other,
            "CPU µs",
            times_base,
            "p50 µs",
            "p99 µs"
        );
        for row in &self.rows {
            let rate = |to: &str| self.row(to).map(|to| row.ratio(to, Slice::per_second));
            let cpu = self
                .row(base)
                .map(|to| row.ratio(to, Slice::cpu_us_per_call));
            let against = rate(base);
            println!(
                "  {:<44} {:>9.0} {:>7} {:>11} {:>7} {:>7.2} {:>7} {:>9.0} {:>9.0}{}",
                row.title,
                row.spread(Slice::per_second).median,
                times(against.map(|s| s.median)),
                against.map_or_else(String::new, |s| format!("{:.2}–{:.2}", s.min, s.max)),
                times(rate(other).map(|s| s.median)),
                row.spread(Slice::cpu_us_per_call).median,
                times(cpu.map(|s| s.median)),
                row.spread(|s| s.p50_us).median,
                row.spread(|s| s.p99_us).median,
                wrong(row),
            );
        }
    }

    pub(crate) fn json(&self, base: &str) -> Value {
        let base = self.row(base);
        let rows: Vec<_> = self.rows.iter().map(|row| row.json(base)).collect();
        json!({"title": self.title, "rows": rows})
    }
}

pub(crate) fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"))
}

/// Fails if a call had another status than it should have.
pub(crate) fn ensure_expected<'a>(rows: impl IntoIterator<Item = &'a Row>) -> anyhow::Result<()> {
    let rounds = rows.into_iter().flat_map(|row| &row.rounds);
    let wrong: u64 = rounds.map(|slice| slice.wrong).sum();
    ensure!(wrong == 0, "{wrong} calls had another status than expected");
    Ok(())
}

pub(crate) fn wrong(row: &Row) -> String {
    let wrong: u64 = row.rounds.iter().map(|s| s.wrong).sum();
    let said = row.rounds.iter().find_map(|s| s.first_wrong.as_deref());
    said.map_or_else(String::new, |said| format!("  {wrong} WRONG: {said}"))
}

/// Writes `name.json`.
pub(crate) fn write_json(folder: &Path, name: &str, value: &Value) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let path = folder.join(format!("{name}.json"));
    fs::write(&path, serde_json::to_string_pretty(value)?)?;
    Ok(())
}

// The chart: one panel below the other, one bar for each row.
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 330.0;
const RIGHT: f64 = 190.0;
const BAR: f64 = 18.0;
const STEP: f64 = 26.0;
const HEAD: f64 = 70.0;
const PANEL_HEAD: f64 = 34.0;
const PANEL_FOOT: f64 = 44.0;

/// What a chart says beside its bars.
pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    /// The row whose throughput is one, and what to call it.
    pub(crate) base: &'static str,
    pub(crate) base_title: &'a str,
    /// Whose processor time stands beside the bars.
    pub(crate) cpu_of: &'a str,
    /// What is counted.
    pub(crate) unit: &'a str,
    /// Beginnings of the names of rows that are there for comparison.
    pub(crate) grey: &'a [&'a str],
}

/// Writes `name.svg`: throughput of each row as a multiple of the chart's base, with the spread.
pub(crate) fn write_chart(
    folder: &Path,
    name: &str,
    chart: &Chart<'_>,
    panels: &[Panel],
) -> anyhow::Result<()> {
    let base = chart.base;
    let height = |panel: &Panel| PANEL_HEAD + STEP * panel.rows.len() as f64 + PANEL_FOOT;
    let total: f64 = HEAD + panels.iter().map(height).sum::<f64>();
    let widest = panels
        .iter()
        .filter_map(|panel| Some((panel, panel.row(base)?)))
        .flat_map(|(panel, to)| {
            panel
                .rows
                .iter()
                .map(move |r| r.ratio(to, Slice::per_second).max)
        })
        .fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / widest;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{total}\" \
         viewBox=\"0 0 {WIDTH} {total}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"20\" y=\"28\" font-size=\"18\" font-weight=\"bold\">{}</text>\n\
         <text x=\"20\" y=\"50\" fill=\"#555555\">Median of the rounds; the line shows the lowest \
         and the highest. Right: times {}, and CPU time of {}.</text>\n",
        escaped(chart.title),
        escaped(chart.base_title),
        escaped(chart.cpu_of),
    );
    let mut top = HEAD;
    for panel in panels {
        chart_panel(&mut svg, chart, panel, top, scale, widest)?;
        top += height(panel);
    }
    svg.push_str("</svg>\n");
    fs::create_dir_all(folder)?;
    fs::write(folder.join(format!("{name}.svg")), svg)?;
    Ok(())
}

fn chart_panel(
    svg: &mut String,
    chart: &Chart<'_>,
    panel: &Panel,
    top: f64,
    scale: f64,
    widest: f64,
) -> anyhow::Result<()> {
    let Some(to) = panel.row(chart.base) else {
        return Ok(());
    };
    writeln!(
        svg,
        "<text x=\"20\" y=\"{}\" font-size=\"15\" font-weight=\"bold\">{}</text>",
        top + 20.0,
        escaped(&panel.title),
    )?;
    let first = top + PANEL_HEAD;
    let bottom = first + STEP * panel.rows.len() as f64;
    let step = match widest {
        ..=2.0 => 0.25,
        ..=8.0 => 0.5,
        _ => 2.0,
    };
    let mut tick = 0.0;
    while tick <= widest {
        let x = LEFT + tick * scale;
        let colour = if tick == 1.0 { "#888888" } else { "#dddddd" };
        writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{first}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"{colour}\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555555\" \
             font-size=\"11\">{tick:.2}</text>",
            bottom + 14.0,
        )?;
        tick += step;
    }
    writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{}\" fill=\"#555555\" font-size=\"11\">{} per second, as a \
         multiple of {}</text>",
        bottom + 30.0,
        escaped(chart.unit),
        escaped(chart.base_title),
    )?;
    for (index, row) in panel.rows.iter().enumerate() {
        let y = first + STEP * index as f64 + (STEP - BAR) / 2.0;
        let (middle, text) = (y + BAR / 2.0, y + BAR - 4.5);
        let ratio = row.ratio(to, Slice::per_second);
        let colour = if chart.grey.iter().any(|start| row.part.starts_with(start)) {
            "#9aa5b1"
        } else {
            "#2f6fb0"
        };
        writeln!(
            svg,
            "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\
             <line x1=\"{:.1}\" y1=\"{middle}\" x2=\"{:.1}\" y2=\"{middle}\" stroke=\"#1c1c1c\"/>\
             <text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{:.2} × · {:.1} µs</text>",
            LEFT - 10.0,
            escaped(&row.title),
            ratio.median * scale,
            LEFT + ratio.min * scale,
            LEFT + ratio.max * scale,
            WIDTH - 20.0,
            ratio.median,
            row.spread(Slice::cpu_us_per_call).median,
        )?;
    }
    Ok(())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

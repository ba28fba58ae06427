use std::path::PathBuf;

use clap::Subcommand;

use super::numbers::grouped;
use crate::{
    config::Settings,
    model::{OnOutage, TierLimits, Tiers},
    usage::load_tiers,
};

#[derive(Subcommand)]
pub(super) enum Command {
    /// Read a tiers file as a server would, and show what it says; names the line that is wrong
    Validate {
        /// Which; else `usage.tiers_file` of the settings, or the built-in tiers
        file: Option<PathBuf>,
    },
}

pub(super) fn run(command: Command, settings: &Settings) -> anyhow::Result<()> {
    let Command::Validate { file } = command;
    let file = file.unwrap_or_else(|| settings.usage.tiers_file.clone());
    let tiers = load_tiers(&file)?;
    super::print(table(&tiers).as_bytes())
}

const HEADINGS: [&str; 6] = [
    "tier",
    "tokens/month",
    "requests/min",
    "tokens/request",
    "on outage",
    "notices at",
];

fn table(tiers: &Tiers) -> String {
    let heading = HEADINGS.map(str::to_owned);
    let default = &tiers.default_tier().name;
    let rows = tiers
        .all
        .iter()
        .flat_map(|tier| rows(tier, tier.name == *default));
    let rows: Vec<[String; 6]> = std::iter::once(heading).chain(rows).collect();
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Numbers stand under each other's last digits.
            line += &if (1..=3).contains(&index) {
                format!("{cell:>width$}  ")
            } else {
                format!("{cell:<width$}  ")
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// The tier's row, and one for each model with a limit of its own.
fn rows(tier: &TierLimits, is_default: bool) -> Vec<[String; 6]> {
    let mark = if is_default { " (default)" } else { "" };
    let on_outage = match tier.on_outage {
        OnOutage::Closed => "closed".to_owned(),
        OnOutage::Open { open_tokens } => format!("open: {}", grouped(open_tokens)),
    };
    let percents: Vec<String> = tier.thresholds.iter().map(|p| format!("{p}%")).collect();
    let mut rows = vec![[
        format!("{}{mark}", tier.name),
        limit(tier.monthly_tokens),
        limit(tier.requests_per_minute),
        limit(tier.max_request_tokens),
        on_outage,
        percents.join(" "),
    ]];
    for (model, tokens) in &tier.models {
        let mut row = <[String; 6]>::default();
        row[0] = format!("  {model}");
        row[1] = grouped(*tokens);
        rows.push(row);
    }
    rows
}

fn limit(limit: Option<i64>) -> String {
    limit.map_or_else(|| "unlimited".to_owned(), grouped)
}

//! What the documents say of the tests.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// How a row of `docs/security.md` may begin.
const VERDICTS: [&str; 5] = ["Met", "Partly", "Not met", "Client's", "Not used"];

#[test]
fn every_row_of_the_security_document_is_judged_and_shown_by_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for folder in ["src", "tests/it"] {
        collect(&root.join(folder), &root.join(folder), &mut known);
    }
    assert!(known.len() > 500, "found {} tests", known.len());
    let document = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let (mut rows, mut wrong) = (0, Vec::new());
    for row in rows_of(&document) {
        rows += 1;
        wrong.extend(faults(&row, &known, &root.join("docs")));
    }
    assert!(rows > 80, "found {rows} rows");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn rows_that_claim_too_much_are_found() {
    let known = BTreeSet::from(["auth::login::it_works".to_owned()]);
    let faults_of = |row: &str| {
        let rows: Vec<Vec<&str>> = rows_of(row).collect();
        faults(&rows[0], &known, Path::new(env!("CARGO_MANIFEST_DIR"))).len()
    };
    for (row, count) in [
        ("| V1 | asks | Met: so | `auth::login::it_works` |", 0),
        ("| V1 | asks | Partly: so | [README](README.md#start) |", 0),
        ("| V1 | asks | Not met: so | |", 0),
        ("| V1 | asks | Met: so | `auth::login::it_worked` |", 1),
        ("| V1 | asks | Met: so | |", 1),
        ("| V1 | asks | Partly | |", 1),
        ("| V1 | asks | Met: so | [README](NONE.md) |", 1),
        ("| V1 | asks | Maybe | `auth::login::it_works` |", 1),
    ] {
        assert_eq!(faults_of(row), count, "{row}");
    }
}

/// The cells of the rows of all tables, without heads and lines.
fn rows_of(document: &str) -> impl Iterator<Item = Vec<&str>> {
    let rows = document.lines().filter_map(|line| {
        let line = line.strip_prefix("| ")?.strip_suffix('|')?;
        Some(line.split('|').map(str::trim).collect::<Vec<_>>())
    });
    let mut width = None;
    rows.filter(move |cells| {
        let is_head = cells.last() == Some(&"shown by");
        if is_head {
            width = Some(cells.len());
        }
        assert!(width.is_none_or(|width| width == cells.len()), "{cells:?}");
        cells[0] != "---" && !is_head
    })
}

/// What is wrong with a row, whose last cells say how it stands and what shows it.
fn faults(row: &[&str], known: &BTreeSet<String>, folder: &Path) -> Vec<String> {
    let [name, .., here, shown] = row else {
        return vec![format!("{row:?} is too short")];
    };
    let mut faults = Vec::new();
    let Some(verdict) = VERDICTS.iter().find(|verdict| here.starts_with(**verdict)) else {
        return vec![format!("{name}: begins with none of {VERDICTS:?}")];
    };
    if matches!(*verdict, "Met" | "Partly") && shown.is_empty() {
        faults.push(format!("{name}: is not shown by anything"));
    }
    for part in shown.split(", ").filter(|part| !part.is_empty()) {
        let test = part.strip_prefix('`').and_then(|t| t.strip_suffix('`'));
        let link = part.split_once("](").and_then(|(_, l)| l.strip_suffix(')'));
        let exists = match (test, link) {
            (Some(test), _) => known.contains(test),
            (None, Some(link)) => {
                let file = link.split('#').next().unwrap_or_default();
                folder.join(file).exists()
            }
            (None, None) => false,
        };
        if !exists {
            faults.push(format!("{name}: there is no {part}"));
        }
    }
    faults
}

/// Finds tests by the module of their file and their name.
fn collect(root: &Path, folder: &Path, known: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, known);
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let module = path.strip_prefix(root).unwrap().with_extension("");
        let module = module.to_str().unwrap().replace('/', "::");
        let module = module.strip_suffix("::mod").unwrap_or(&module);
        let mut is_test = false;
        for line in fs::read_to_string(&path).unwrap().lines() {
            let line = line.trim_start();
            let name = line.strip_prefix("async fn ").or(line.strip_prefix("fn "));
            match name {
                Some(name) if is_test => {
                    let name = name.split('(').next().unwrap();
                    known.insert(format!("{module}::{name}"));
                    is_test = false;
                }
                Some(_) => is_test = false,
                None => is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test"),
            }
        }
    }
}

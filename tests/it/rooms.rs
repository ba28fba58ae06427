//! The import rule between the rooms of `src/`, read from the source.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Every room and the rooms that it may name; `*` is all of them.
const ROOMS: [(&str, &[&str]); 20] = [
    ("auth", &["store", "model", "error", "config", "clock"]),
    ("clock", &[]),
    ("cli", &["*"]),
    ("client", &["proto"]),
    ("config", &["model"]),
    ("embedded", &[]),
    ("error", &["model"]),
    (
        "grpc",
        &[
            "auth", "usage", "model", "error", "proto", "config", "clock",
        ],
    ),
    ("lib", &[]),
    ("mail", &["model", "config"]),
    ("main", &["cli"]),
    ("model", &[]),
    ("ops", &["auth", "usage", "store", "grpc", "tasks", "clock"]),
    ("proto", &[]),
    ("server", &["*"]),
    ("store", &["model", "error", "config"]),
    (
        "tasks",
        &[
            "store", "auth", "usage", "model", "error", "mail", "webhook", "clock",
        ],
    ),
    ("telemetry", &["config"]),
    ("usage", &["store", "model", "error", "config", "clock"]),
    ("webhook", &["config"]),
];

/// Libraries, with all that extend their name by an underscore, and the rooms that may name them.
const LIBRARIES: [(&str, &[&str]); 2] = [
    ("tonic", &["proto", "grpc", "client", "server"]),
    ("diesel", &["store"]),
];

#[test]
fn every_room_names_only_what_it_may() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    assert!(files.len() > 50, "found {} files", files.len());
    let mut broken = Vec::new();
    for file in files {
        let path = file.strip_prefix(&root).unwrap().to_str().unwrap();
        broken.extend(violations(path, &fs::read_to_string(&file).unwrap()));
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn a_path_into_a_room_out_of_reach_is_found_however_it_is_written() {
    for (path, source, named) in [
        ("model/user.rs", "use crate::store::Store;", "store"),
        (
            "model/user.rs",
            "use crate::{error, store::{self, Store}};",
            "store",
        ),
        (
            "model/user.rs",
            "fn f() -> crate::error::Error { g() }",
            "error",
        ),
        ("model/user.rs", "use super::super::error::Error;", "error"),
        ("model/mod.rs", "use super::error::Error;", "error"),
        (
            "model/user.rs",
            "use super::{super::error::Error};",
            "error",
        ),
        (
            "model/user.rs",
            "mod inner { use super::super::super::error::Error; }",
            "error",
        ),
        ("model/user.rs", "use crate::*;", "*"),
        (
            "auth/mod.rs",
            "use crate::{\n    error::Error,\n    usage::Usage,\n};",
            "usage",
        ),
        ("usage/mod.rs", "use crate::auth::Auth;", "auth"),
        ("store/mod.rs", "pub use crate::auth::Auth as A;", "auth"),
        ("grpc/auth.rs", "use crate::store::Store;", "store"),
        ("config.rs", "use super::store::Store;", "store"),
        (
            "main.rs",
            "fn main() { tollkeeper::server::run() }",
            "server",
        ),
        (
            "tasks/x.rs",
            "let s = \"{\"; use crate::grpc::Rules;",
            "grpc",
        ),
        ("auth/x.rs", "use tonic::Status;", "tonic"),
        (
            "auth/x.rs",
            "use ::tonic_types::StatusExt as _;",
            "tonic_types",
        ),
        ("auth/x.rs", "use {std::fmt, tonic};", "tonic"),
        (
            "model/x.rs",
            "#[diesel(sql_type = Text)] struct X;",
            "diesel",
        ),
        (
            "grpc/x.rs",
            "use diesel_async::AsyncPgConnection;",
            "diesel_async",
        ),
        ("grpc/x.rs", "extern crate diesel;", "diesel"),
    ] {
        let found = violations(path, source);
        let says = format!("{path}: must not name {named}");
        assert!(found.contains(&says), "{source}: {found:?}");
    }
}

#[test]
fn what_is_allowed_is_not_reported() {
    for (path, source) in [
        (
            "auth/mod.rs",
            "use crate::{error::Error, store::{Store, auth}};",
        ),
        (
            "auth/x.rs",
            "use crate::auth::Auth; use super::{Auth, usage};",
        ),
        (
            "grpc/mod.rs",
            "use crate::auth::Auth; use tonic::Status; pub(crate) fn f() {}",
        ),
        ("server.rs", "use crate::store::Store;"),
        (
            "model/x.rs",
            "// use crate::store::Store;\n/* use /* tonic:: */ diesel::x */",
        ),
        (
            "model/x.rs",
            "const X: &str = r#\"crate::store::X\"#; const C: char = '\"';",
        ),
        ("model/x.rs", "fn f<'a>(x: &'a str) {}"),
        (
            "model/x.rs",
            "#[cfg(test)]\n#[expect(x)]\nmod tests { use crate::store::Store; }",
        ),
        ("model/x.rs", "#[cfg(test)]\nuse crate::store::Store;"),
        ("model/x.rs", "let diesel = 1; x.tonic.y();"),
    ] {
        assert_eq!(violations(path, source), [] as [&str; 0], "{source}");
    }
}

#[test]
fn a_test_exempts_only_its_own_item() {
    let source = "#[cfg(test)] mod tests { fn f() {} } use crate::store::Store;";
    assert_eq!(violations("model/x.rs", source).len(), 1);
    let source = "#[cfg(test)] use crate::error::Error; use crate::store::Store;";
    assert_eq!(violations("model/x.rs", source).len(), 1);
}

#[test]
fn a_room_without_a_rule_is_reported() {
    assert_eq!(
        violations("helpers/x.rs", ""),
        ["helpers/x.rs: no rule for the room helpers"]
    );
}

/// What a file below `src/` names against the rule.
fn violations(path: &str, source: &str) -> Vec<String> {
    let modules: Vec<&str> = path.trim_end_matches(".rs").split('/').collect();
    let room = modules[0];
    let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| *name == room) else {
        return vec![format!("{path}: no rule for the room {room}")];
    };
    let depth = modules.iter().filter(|module| **module != "mod").count();
    let tokens = without_tests(&tokens(source));
    let mut broken = Vec::new();
    let rooms = rooms_named(&tokens, depth);
    broken.extend(rooms.into_iter().filter(|named| {
        let is_room = *named == "*" || ROOMS.iter().any(|(name, _)| name == named);
        let may = *named == room || allowed.contains(named) || allowed.contains(&"*");
        is_room && !may
    }));
    for (library, rooms) in LIBRARIES {
        if !rooms.contains(&room) {
            broken.extend(library_named(&tokens, library));
        }
    }
    let says = |named| format!("{path}: must not name {named}");
    broken.into_iter().map(says).collect()
}

/// The names that follow the root of the crate in the paths of a file `depth` modules below it.
fn rooms_named<'a>(tokens: &[&'a str], depth: usize) -> Vec<&'a str> {
    let mut named = Vec::new();
    // The braces that are open, and which of them are of inline modules.
    let mut braces = Vec::new();
    for at in 0..tokens.len() {
        let before = |n: usize| at.checked_sub(n).map(|at| tokens[at]);
        match tokens[at] {
            "{" => braces.push(before(2) == Some("mod")),
            "}" => drop(braces.pop()),
            "crate" | "tollkeeper" if before(1) != Some("$") => tree(tokens, at + 1, 0, &mut named),
            "super" if before(1) != Some("::") => {
                let inline = braces.iter().filter(|is_module| **is_module).count();
                tree(tokens, at, depth + inline, &mut named);
            }
            _ => {}
        }
    }
    named
}

/// Follows a path or a tree of paths from `at`, in a module `level` below the root.
fn tree<'a>(tokens: &[&'a str], mut at: usize, mut level: usize, named: &mut Vec<&'a str>) {
    while let Some(token) = tokens.get(at) {
        match *token {
            "super" => level = level.saturating_sub(1),
            "self" => {}
            "::" => {
                let next = tokens.get(at + 1).copied().unwrap_or_default();
                if level == 0 && (next == "*" || is_name(next)) && next != "super" {
                    named.push(next);
                    return;
                }
                if next == "{" {
                    return group(tokens, at + 1, level, named);
                }
                if next != "super" && next != "self" {
                    return;
                }
            }
            _ => return,
        }
        at += 1;
    }
}

/// Follows every path of the group that opens at `at`.
fn group<'a>(tokens: &[&'a str], mut at: usize, level: usize, named: &mut Vec<&'a str>) {
    let mut open = 0;
    while let Some(token) = tokens.get(at) {
        match *token {
            "{" => open += 1,
            "}" => open -= 1,
            _ => {}
        }
        if open == 0 {
            return;
        }
        if open == 1 && ["{", ","].contains(token) {
            let next = tokens.get(at + 1).copied().unwrap_or_default();
            if next == "super" {
                tree(tokens, at + 1, level, named);
            } else if level == 0 && (next == "*" || is_name(next)) {
                named.push(next);
            }
        }
        at += 1;
    }
}

/// The library and those that extend its name, where a path, an import or an attribute names them.
fn library_named<'a>(tokens: &[&'a str], library: &str) -> Vec<&'a str> {
    let named = |at: &usize| {
        let extends = tokens[*at].strip_prefix(library);
        let is_it = extends.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
        let before = at.checked_sub(1).map_or("", |at| tokens[at]);
        let after = tokens.get(at + 1).copied().unwrap_or_default();
        let is_path = after == "::" && (before != "::" || !is_name_before(tokens, *at));
        let is_import = ["use", "crate"].contains(&before)
            || (["{", ","].contains(&before) && ["}", ",", "as"].contains(&after));
        is_it && (is_path || is_import || (before == "[" && after == "("))
    };
    let found = (0..tokens.len()).filter(named);
    found.map(|at| tokens[at]).collect()
}

/// Whether a name stands before the `::` before `at`.
fn is_name_before(tokens: &[&str], at: usize) -> bool {
    at.checked_sub(2).is_some_and(|at| {
        is_name(tokens[at]) && !["use", "mut", "as", "dyn", "impl"].contains(&tokens[at])
    })
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Leaves out every item under `#[cfg(test)]`.
fn without_tests<'a>(tokens: &[&'a str]) -> Vec<&'a str> {
    const CFG_TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].starts_with(&CFG_TEST) {
            kept.push(tokens[at]);
            at += 1;
            continue;
        }
        at += CFG_TEST.len();
        let mut open = 0;
        let is_use = tokens[at..].first() == Some(&"use");
        while let Some(token) = tokens.get(at) {
            at += 1;
            match *token {
                "{" | "(" | "[" => open += 1,
                "}" | ")" | "]" => open -= 1,
                _ => {}
            }
            let ends = *token == ";" || (*token == "}" && !is_use);
            if open == 0 && ends {
                break;
            }
        }
    }
    kept
}

/// Names, `::` and single characters; no comments, no literals of text.
fn tokens(source: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = text_literal(rest) {
            length
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            let length = end.unwrap_or(rest.len());
            tokens.push(&rest[..length]);
            length
        } else if rest.starts_with("::") {
            tokens.push("::");
            2
        } else {
            let length = first.len_utf8();
            if !first.is_whitespace() {
                tokens.push(&rest[..length]);
            }
            length
        };
        rest = &rest[length..];
    }
    tokens
}

/// Length of the comment that `text` begins with; block comments nest.
fn block_comment(text: &str) -> usize {
    let (mut open, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        let step = match rest {
            [b'/', b'*', ..] => 1,
            [b'*', b'/', ..] => -1,
            _ => 0,
        };
        open += step;
        at += if step == 0 { 1 } else { 2 };
        if open == 0 {
            break;
        }
    }
    at
}

/// Length of the string or character literal that `text` begins with.
fn text_literal(text: &str) -> Option<usize> {
    let body = text.trim_start_matches(['b', 'c']);
    let prefix = text.len() - body.len();
    if let Some(raw) = body.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let start = prefix + 1 + hashes + 1;
            let found = text[start..].find(&end)?;
            return Some(start + found + end.len());
        }
        return None;
    }
    let quote = body.chars().next().filter(|c| ['"', '\''].contains(c))?;
    // A lifetime has no closing quote after its first character.
    let inner: Vec<char> = body.chars().skip(1).take(2).collect();
    if quote == '\'' && inner.first() != Some(&'\\') && inner.get(1) != Some(&'\'') {
        return None;
    }
    let mut escaped = false;
    for (at, c) in body.char_indices().skip(1) {
        if c == quote && !escaped {
            return Some(prefix + at + 1);
        }
        escaped = c == '\\' && !escaped;
    }
    None
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

//! Which passwords may be set: long enough, and hard to guess for who knows their owner.

use zxcvbn::zxcvbn;

use crate::{
    config::{PasswordScheme, PasswordSettings},
    model::{Person, Violation},
};

/// NIST 800-63B §3.1.1.2 asks for 64 at least.
const MAX_CHARS: usize = 128;

/// bcrypt reads no further (OWASP Password Storage Cheat Sheet).
pub(super) const BCRYPT_MAX_BYTES: usize = 72;

/// Whether a password has an acceptable length: no rules of composition (NIST 800-63B §3.1.1.2).
pub(super) fn check_length(password: &str, settings: &PasswordSettings) -> Result<(), Violation> {
    let (min, chars) = (settings.min_length, password.chars().count());
    if chars < min || chars > MAX_CHARS {
        return Err(format!("must be {min} to {MAX_CHARS} characters").into());
    }
    if password.contains('\0') {
        return Err("must not hold a NUL character".into());
    }
    let bcrypt = settings.scheme == PasswordScheme::Bcrypt;
    if bcrypt && password.len() > BCRYPT_MAX_BYTES {
        return Err(format!("must be at most {BCRYPT_MAX_BYTES} bytes").into());
    }
    Ok(())
}

/// Whether a password is hard enough to guess. Takes milliseconds: nothing for a thread that serves.
///
/// Of long passwords the first 100 characters are judged. All of them are hashed.
pub(super) fn check_strength(
    password: &str,
    names: &[String],
    settings: &PasswordSettings,
) -> Result<(), Violation> {
    if settings.min_strength == 0 {
        return Ok(());
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let folded = folded(password);
    let judged = zxcvbn(folded.as_deref().unwrap_or(password), &names);
    if u8::from(judged.score()) >= settings.min_strength {
        return Ok(());
    }
    let warning = judged.feedback().and_then(|feedback| feedback.warning());
    Err(match warning {
        Some(warning) => {
            let warning = warning.to_string();
            format!("must be harder to guess. {}", warning.trim_end_matches('.')).into()
        }
        None => "must be harder to guess: a few more words help most".into(),
    })
}

/// Signs that stand for letters, and for several of them.
const SIGNS: &str = "4@({[<691!|7$50+";

/// More different ones are in nobody's password by chance.
const MAX_SIGNS: usize = 6;

/// The password with one sign for each letter, if it has very many of them: every reading of all of
/// them together is tried, which is 800 where all occur, and seconds of a hash thread.
fn folded(password: &str) -> Option<String> {
    let signs = SIGNS.chars().filter(|sign| password.contains(*sign));
    if signs.count() <= MAX_SIGNS {
        return None;
    }
    let fold = |sign| match sign {
        '@' => '4',
        '{' | '[' | '<' => '(',
        '9' => '6',
        '!' | '|' => '1',
        '$' => '5',
        '+' => '7',
        other => other,
    };
    Some(password.chars().map(fold).collect())
}

/// What somebody who knows a person tries first: their names, in the forms that they come in, and ours.
pub(super) fn names_of(person: &Person) -> Vec<String> {
    let (email, full_name) = (person.email.as_str(), person.full_name.as_str());
    let (local, domain) = email.rsplit_once('@').unwrap_or((email, ""));
    let whole = [email, local, domain, person.username.as_str(), full_name];
    let parts = [local, domain, person.username.as_str(), full_name]
        .into_iter()
        .flat_map(|name| name.split(|c: char| !c.is_alphanumeric()));
    let joined = full_name.split_whitespace().collect();
    let mut names: Vec<String> = whole.into_iter().chain(parts).map(str::to_owned).collect();
    names.push(joined);
    names.push(env!("CARGO_PKG_NAME").to_owned());
    // Of a letter or two everything is made.
    names.retain(|name| name.chars().count() > 2);
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ada() -> Person {
        Person {
            email: "ada.byron@analytical-engines.example"
                .parse()
                .expect("valid"),
            username: "countess1815".parse().expect("valid"),
            full_name: "Augusta Ada King Lovelace".parse().expect("valid"),
        }
    }

    fn judged(password: &str) -> Result<(), Violation> {
        let settings = PasswordSettings::default();
        check_length(password, &settings)?;
        check_strength(password, &names_of(&ada()), &settings)
    }

    #[test]
    fn what_everybody_tries_first_is_refused() {
        for weak in [
            "password1234",
            "qwertyuiop12",
            "aaaaaaaaaaaa",
            "123456789012",
            "abcabcabcabc",
            "iloveyou2026",
            "tollkeepertollkeeper",
        ] {
            assert!(judged(weak).is_err(), "{weak}");
        }
    }

    #[test]
    fn ones_own_names_are_refused_however_they_are_put_together() {
        for weak in [
            "ada.byron@analytical-engines.example",
            "countess1815",
            "COUNTESS1815",
            "Augusta Ada King Lovelace",
            "augustaadakinglovelace",
            "countess1815!",
            "ada.byron123",
            "l0velaceAugusta",
        ] {
            let refused = judged(weak).expect_err(weak);
            assert!(!refused.contains(weak));
        }
        // For somebody else it is a fine one.
        let strong = PasswordSettings::default();
        let nobody = check_strength("countess1815 lovelace", &[], &strong);
        assert_eq!(nobody, Ok(()));
    }

    #[test]
    fn words_and_randomness_are_accepted_without_rules_of_composition() {
        for strong in [
            "correct horse battery staple",
            "analytical engine",
            "kjsdhfqwmzpt",
            "üäöéß ñandú çedilla",
            &"kjsdhf8723hf".repeat(10),
        ] {
            assert_eq!(judged(strong), Ok(()), "{strong}");
        }
    }

    #[test]
    fn strength_may_be_left_out() {
        let settings = PasswordSettings {
            min_strength: 0,
            ..PasswordSettings::default()
        };
        assert_eq!(check_strength("aaaaaaaaaaaa", &[], &settings), Ok(()));
    }

    #[test]
    fn the_dearest_password_to_judge_takes_a_moment() {
        let names = names_of(&ada());
        let begun = std::time::Instant::now();
        for dear in [
            "Passw0rdpassword1qwertyuiop".repeat(4),
            "4b1!".repeat(32),
            "4@8({[<3691!|0$5+7%2".repeat(5),
            "4(691$0".repeat(14),
        ] {
            let _ = check_strength(&dear, &names, &PasswordSettings::default());
            let took = begun.elapsed();
            // Without optimization, beside others; every reading of all signs took minutes.
            assert!(took < std::time::Duration::from_secs(8), "{dear}: {took:?}");
        }
    }
}

use std::{collections::HashMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::model::{Scope, ScopeSet};

/// TLS on the gRPC listener, and who is who by certificate.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsSettings {
    /// PEM: the server's certificate and what leads to its root. Empty: no TLS.
    pub cert_file: PathBuf,
    /// PEM: the certificate's key.
    pub key_file: PathBuf,
    /// PEM: who signs certificates of clients. Empty: clients are asked for none.
    pub client_ca_file: PathBuf,
    /// Services by their certificates: `identity=scope scope, …`. An identity with `://` is a URI,
    /// such as a SPIFFE ID, any other a DNS name, among the certificate's alternative names of that
    /// kind. Only of DNS names the case does not count.
    pub clients: String,
}

impl TlsSettings {
    pub fn is_set(&self) -> bool {
        !self.cert_file.as_os_str().is_empty()
    }

    /// What each identity may do.
    ///
    /// # Errors
    /// What is wrong with `clients`.
    pub fn identities(&self) -> Result<HashMap<String, ScopeSet>, String> {
        let mut identities = HashMap::new();
        let entries = self.clients.split(',').map(str::trim);
        for entry in entries.filter(|entry| !entry.is_empty()) {
            let (identity, scopes) = entry
                .split_once('=')
                .ok_or_else(|| format!("{entry:?} must be identity=scope, or several by spaces"))?;
            let names: Vec<_> = scopes.split_whitespace().map(str::to_owned).collect();
            let scopes = ScopeSet::parse(&names)
                .map_err(|violation| format!("the scopes of {identity:?} {violation}"))?;
            // What administrators do is written down under a name that is in the database.
            if scopes.contains(Scope::Admin) {
                return Err(format!(
                    "{identity:?} must not have the scope admin: use a key"
                ));
            }
            let identity = match identity.trim() {
                uri if is_uri(uri) => uri.to_owned(),
                host => host.to_ascii_lowercase(),
            };
            if identity.is_empty() || identities.insert(identity.clone(), scopes).is_some() {
                return Err(format!(
                    "{identity:?} must be an identity that is there once"
                ));
            }
        }
        Ok(identities)
    }

    /// # Errors
    /// The setting that is at fault, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let is_set = |path: &PathBuf| !path.as_os_str().is_empty();
        if self.is_set() != is_set(&self.key_file) {
            let missing = if self.is_set() {
                "tls.key_file"
            } else {
                "tls.cert_file"
            };
            return Err((missing, "must be set with the other of both".to_owned()));
        }
        if is_set(&self.client_ca_file) && !self.is_set() {
            return Err(("tls.client_ca_file", "needs tls.cert_file".to_owned()));
        }
        if !self.clients.is_empty() && !is_set(&self.client_ca_file) {
            return Err(("tls.clients", "needs tls.client_ca_file".to_owned()));
        }
        self.identities()
            .map_err(|message| ("tls.clients", message))?;
        Ok(())
    }
}

/// Whether an identity is a URI; else it is a DNS name.
pub fn is_uri(identity: &str) -> bool {
    identity.contains("://")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(text: &str) -> TlsSettings {
        let path = || PathBuf::from("a.pem");
        TlsSettings {
            cert_file: path(),
            key_file: path(),
            client_ca_file: path(),
            clients: text.to_owned(),
        }
    }

    #[test]
    fn identities_have_their_scopes() {
        let settings = clients(
            "spiffe://x/edge=gateway, spiffe://x/Edge=quota, Billing.internal=usage.write usage.read,",
        );
        settings.check().expect("valid");
        let read = settings.identities().expect("valid");
        assert_eq!(read.len(), 3);
        assert_eq!(read["spiffe://x/edge"].names(), ["gateway"]);
        assert_eq!(read["spiffe://x/Edge"].names(), ["quota"]);
        assert_eq!(
            read["billing.internal"].names(),
            ["usage.write", "usage.read"]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "edge",
            "edge=",
            "edge=all",
            "=gateway",
            "a=quota,A=quota",
            "spiffe://x/a=quota,spiffe://x/a=gateway",
            "a=admin",
        ] {
            let refused = clients(text).check().expect_err(text);
            assert_eq!(refused.0, "tls.clients", "{text}");
        }
        let bare = TlsSettings {
            clients: "a=quota".to_owned(),
            ..TlsSettings::default()
        };
        assert_eq!(bare.check().expect_err("refused").0, "tls.clients");
        let half = TlsSettings {
            key_file: "a.pem".into(),
            ..TlsSettings::default()
        };
        assert_eq!(half.check().expect_err("refused").0, "tls.cert_file");
    }
}

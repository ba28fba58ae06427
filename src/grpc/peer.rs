use std::{net::SocketAddr, sync::Arc};

use crate::model::ScopeSet;

/// Who is at the other end of a connection; in the extensions of every request.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    pub address: Option<SocketAddr>,
    /// What its certificate lets a service do that shows no key. `None`: it has shown none, or one of
    /// somebody who is not known here.
    pub scopes: Option<Arc<ScopeSet>>,
}

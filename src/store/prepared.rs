/// Makes fragments of SQL queries of these types, with a static id: those are prepared once on a
/// connection.
macro_rules! prepared {
    ($($name:ident $(<$life:lifetime>)? => $types:ty = $static:ty;)*) => {$(
        impl $(<$life>)? QueryId for $name $(<$life>)? {
            type QueryId = $static;
            const HAS_STATIC_QUERY_ID: bool = true;
        }

        impl $(<$life>)? Query for $name $(<$life>)? {
            type SqlType = $types;
        }
    )*};
}

pub(super) use prepared;
